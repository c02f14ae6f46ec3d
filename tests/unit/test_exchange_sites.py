"""Adapters from Civitai and the hub, and to the hub: servers on loopback speak what those sites document."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from haori.core.errors import DownloadError, FileFormatError
from haori.core.settings import settings
from haori.library import Library
from haori.library.exchange.addresses import parse_address
from haori.library.exchange.fetching import fetch
from tests.command_line import haori
from tests.hub_double import Hub, running_hub
from tests.library_samples import stock_lora
from tests.loopback_site import Site, running
from tests.lora_files import kohya_file


@pytest.fixture
def lora(tmp_path) -> bytes:
    return kohya_file(tmp_path / "source.safetensors", ss_output_name="ink").read_bytes()


@pytest.fixture
def civitai(monkeypatch, haori_home):
    with running() as site:
        monkeypatch.setenv("HAORI_CIVITAI_ENDPOINT", site.url)
        monkeypatch.setenv("HAORI_DOWNLOAD_FROM_LOOPBACK", "true")
        monkeypatch.delenv("CIVITAI_API_TOKEN", raising=False)
        settings.cache_clear()
        yield site
        settings.cache_clear()


def offer(site: Site, data: bytes, *, stated: bytes | None = None, **changes: Any) -> None:
    """Make the site offer version 77 of model 5, in the replies that Civitai documents."""
    sha256 = hashlib.sha256(data if stated is None else stated).hexdigest().upper()
    version = {
        "id": 77, "modelId": 5, "name": "v2", "baseModel": "SD 1.5", "trainedWords": ["sumi-e", "ink wash"],
        "description": "<p>Painted <b>ink</b></p>", "model": {"name": "Ink", "type": "LORA", "nsfw": False},
        "files": [
            {"name": "old.ckpt", "type": "Model", "sizeKB": 1, "hashes": {}, "downloadUrl": f"{site.url}/pickle"},
            {"name": "ink_v2.safetensors", "type": "Model", "sizeKB": len(data) / 1024, "primary": True,
             "metadata": {"format": "SafeTensor"}, "pickleScanResult": "Success",
             "hashes": {"SHA256": sha256, "AutoV2": sha256[:10]}, "downloadUrl": f"{site.url}/api/download/models/77"},
        ],
        **changes,
    }  # fmt: skip
    model = {"id": 5, "name": "Ink", "tags": ["painting", "style"], "allowNoCredit": False, "allowDerivatives": True,
             "allowCommercialUse": ["Image", "RentCivit"], "allowDifferentLicense": False}  # fmt: skip
    site.routes["/api/v1/model-versions/77"] = lambda request: request.send(json.dumps(version).encode())
    site.routes["/api/v1/models/5"] = lambda request: request.send(json.dumps(model).encode())
    site.routes["/api/download/models/77"] = lambda request: request.redirect("/signed/file?X-Sig=1")
    site.routes["/signed/file"] = lambda request: request.send_file(data)


def test_a_version_of_civitai_is_added_with_what_its_page_says(capsys, civitai, lora):
    offer(civitai, lora)
    done = haori(capsys, "library", "add", "civitai:77")
    assert done.code == 0, done.err
    assert "which is what its site states" in done.out
    stored = Library().get("ink_v2")
    card = stored.card
    assert card.downloaded_from == "civitai:77" and card.base.family == "sd15"
    assert card.trigger_words == ("sumi-e", "ink wash") and card.tags == ("painting", "style")
    assert card.stated_bases == ("SD 1.5",) and card.description == "Ink v2 - Painted ink"
    assert card.permissions.commercial_use == ("Image", "RentCivit") and not card.permissions.no_credit
    assert card.file_hashes["sha256"] == hashlib.sha256(lora).hexdigest()
    assert not list((settings().cache / "downloads").glob("*/adapter*"))  # the library has it now
    assert "conditions" in haori(capsys, "library", "licence", "ink_v2").out or card.licence is None


def test_a_token_is_for_civitai_and_not_for_where_its_files_lie(civitai, lora, monkeypatch):
    monkeypatch.setenv("CIVITAI_API_TOKEN", "secret")
    offer(civitai, lora)
    with running() as store:
        store.routes["/file"] = lambda request: request.send_file(lora)
        civitai.routes["/api/download/models/77"] = lambda request: request.redirect(f"{store.url}/file")
        fetch(parse_address("civitai:77"))
        assert {headers.get("Authorization") for _, _, headers in civitai.seen} == {"Bearer secret"}
        assert [headers.get("Authorization") for _, _, headers in store.seen] == [None]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": {"type": "Checkpoint", "name": "Big"}}, DownloadError, "is a Checkpoint"),
        (
            {"files": [{"name": "a.pt", "type": "Model", "downloadUrl": "https://x/"}]},
            FileFormatError,
            "pickles are not",
        ),
        ({"files": "none"}, FileFormatError, "no safetensors file"),
    ],
)
def test_what_is_no_lora_is_not_fetched(civitai, lora, changes, error, said):
    offer(civitai, lora, **changes)
    with pytest.raises(error, match=said):
        fetch(parse_address("civitai:77"))
    assert not any("download" in path for _, path, _ in civitai.seen)


def test_what_civitai_did_not_state_is_not_kept(civitai, lora):
    offer(civitai, lora, stated=b"something else")
    with pytest.raises(DownloadError, match="its site states"):
        fetch(parse_address("civitai:77"))
    message = b'{"error":"Unauthorized","message":"The creator of this asset requires you to be logged in"}'
    offer(civitai, lora)
    civitai.routes["/signed/file"] = lambda request: request.send(message)
    with pytest.raises(DownloadError, match="requires you to be logged in"):
        fetch(parse_address("civitai:77"))
    civitai.routes["/api/download/models/77"] = lambda request: request.send(message, 401)
    with pytest.raises(DownloadError, match=r"answered 401 \(The creator"):
        fetch(parse_address("civitai:77"))
    assert not list((settings().cache / "downloads").glob("*/adapter*"))
    del civitai.routes["/api/v1/model-versions/77"]
    with pytest.raises(DownloadError, match=r"answered 404 \(no such thing\)"):
        fetch(parse_address("civitai:77"))


def test_plain_urls_are_off_unless_allowed(capsys, civitai, lora, monkeypatch):
    civitai.routes["/files/my%20ink.safetensors"] = lambda request: request.send_file(lora)
    url = f"{civitai.url}/files/my%20ink.safetensors?token=secret"
    done = haori(capsys, "library", "add", url)
    assert done.code == 2 and "--allow-url" in done.err and "secret" not in done.err
    assert civitai.seen == []
    done = haori(capsys, "library", "add", url, "--allow-url")
    assert done.code == 0, done.err
    assert "does not state" in done.out
    assert Library().get("my-ink").card.downloaded_from == f"{civitai.url}/files/my%20ink.safetensors"
    monkeypatch.setenv("HAORI_ALLOW_URLS", "true")
    monkeypatch.setenv("HAORI_OFFLINE", "true")
    settings.cache_clear()
    with pytest.raises(DownloadError, match="HAORI_OFFLINE is set"):
        fetch(parse_address(url))


SCRIPT = """
import json, sys
from haori.core.errors import HaoriError
from haori.library.exchange.addresses import parse_address
from haori.library.exchange.fetching import fetch
for address in sys.argv[1:]:
    try:
        found = fetch(parse_address(address))
        files = sorted(path.name for path in (found.path if found.path.is_dir() else found.path.parent).iterdir())
        print(json.dumps([found.called, found.path.name, files, found.is_checked, found.said.licence,
                          found.said.trigger_words, found.said.stated_bases, found.said.downloaded_from]))
    except HaoriError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def in_process(hub: Hub, tmp_path: Path, *command: object, token: str | None = None, **environment: str) -> str:
    """Run Python with the hub double as its hub; `huggingface_hub` reads the environment when it is imported."""
    given = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment,
    }  # fmt: skip
    if token:
        given["HF_TOKEN"] = token
    done = subprocess.run([sys.executable, *map(str, command)], env=given, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_adapters_of_the_hub_are_fetched_as_pinned_files_alone(tmp_path, lora):
    card = b"---\nlicense: apache-2.0\nbase_model: runwayml/sd\ninstance_prompt: a photo of sks\ntags: [lora]\n---\n"
    with running_hub() as hub:
        sha = hub.commit("org/ink", {
            "ink.safetensors": lora, "README.md": card, "evil.py": b"raise SystemExit", "ink.bin": b"\x80\x04",
            "sample.png": b"p" * 100,
        })  # fmt: skip
        hub.commit("org/ink", {"ink.safetensors": lora + b"changed later"})
        hub.commit("org/two", {"a.safetensors": lora, "b.safetensors": lora})
        hub.commit("org/peft", {"adapter_config.json": b"{}", "adapter_model.safetensors": lora, "optimizer.pt": b"x"})
        hub.commit("org/pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04"})
        hub.commit("org/below", {"v1/adapter_model.safetensors": lora, "v1/adapter_config.json": b"{}"})
        hub.commit("org/lies", {"lie.safetensors": lora})
        hub.lies["lie.safetensors"] = lora[:-1] + b"\x00"
        hub.commit("org/secret", {"a.safetensors": lora}, private=True)
        addresses = [
            f"hub:org/ink@{sha}", "hub:org/two", "hub:org/two/b.safetensors", "hub:org/peft", "hub:org/pickle",
            "hub:org/below", "hub:org/below/v1", "hub:org/lies", "hub:org/secret", "hub:org/ink@nope", "hub:org/none",
        ]  # fmt: skip
        lines = in_process(hub, tmp_path, "-c", SCRIPT, *addresses).splitlines()
        told = [json.loads(line) for line in lines if line.startswith(("[", '"'))]
        asked = [path for _, path, _ in hub.seen]
        away = in_process(hub, tmp_path, "-c", SCRIPT, "hub:org/ink", HF_ENDPOINT="http://127.0.0.1:9")
        (offline,) = in_process(hub, tmp_path, "-c", SCRIPT, "hub:org/ink", HAORI_OFFLINE="true").splitlines()
    ink, two, chosen, peft, pickle, below, inside, lies, secret, revision, none = told
    assert ink == [
        "ink", "ink.safetensors", ["README.md", "ink.safetensors"], True, "Apache-2.0", ["a photo of sks"],
        ["runwayml/sd"], f"hub:org/ink@{sha}",
    ]  # fmt: skip
    assert "several LoRA files: 'a.safetensors', 'b.safetensors'; choose one, as in hub:org/two/a.safetensors" in two
    assert chosen[:3] == ["b", "b.safetensors", ["b.safetensors"]]
    assert peft[2] == ["adapter_config.json", "adapter_model.safetensors"]
    assert "only the pickle 'adapter_model.bin'" in pickle and "'v1/adapter_model.safetensors'" in below
    assert inside[2] == ["adapter_config.json", "adapter_model.safetensors"]
    assert "is not what the hub states" in lies or "could not" in lies or "hub cannot be reached" in lies, lies
    assert "is not there, or private" in secret and "is not there, or private" in none
    assert "no revision 'nope'" in revision
    assert "HAORI_OFFLINE is set" in offline
    assert away.startswith('"DownloadError: The hub cannot be reached for'), away
    assert not any(name in path for path in asked for name in ("evil.py", ".bin", ".pt", "sample.png"))


PUSHES = """
import json, os, sys
from pathlib import Path
from haori.bases import find_base
from haori.core.errors import HaoriError
from haori.library import Library, import_adapter
from haori.library.exchange.addresses import parse_address
from haori.library.exchange.fetching import fetch
from haori.library.exchange.pushing import push_stored
from haori.library.stated import Stated
folder, base, image = sys.argv[1:]
base = find_base(base)
import_adapter(Path(folder), base, name="mine", stated=Stated(licence="MIT"))
import_adapter(Path(image), name="ink")

def attempt(name, address, token, **options):
    os.environ["HF_TOKEN"] = token
    try:
        return push_stored(name, address, **options)
    except HaoriError as error:
        return f"{type(error).__name__}: {error}"

told = [
    attempt("ink", "hub:me/refused", ""),
    attempt("ink", "hub:me/open", "hf_test", private=True),
    attempt("ink", "hub:me/ink", "hf_test"),
    attempt("ink", "civitai:1", "hf_test"),
    attempt("mine", "hub:me/mine", "hf_test", private=True),
]
sha = told[-1].rpartition("/")[2]
found = fetch(parse_address(f"hub:me/mine@{sha}"))
back = import_adapter(found.path, base, name="back", stated=found.said).card
print(json.dumps([told, back.names, found.said.downloaded_from == f"hub:me/mine@{sha}"]))
"""


def test_an_adapter_is_pushed_with_its_card_and_comes_back_the_same(haori_home, tiny_base_folder, tmp_path):
    folder = stock_lora(tiny_base_folder, tmp_path / "adapter")
    image = kohya_file(tmp_path / "ink.safetensors", ss_output_name="ink")
    with running_hub() as hub:
        hub.commit("me/open", {})
        said = in_process(hub, tmp_path, "-c", PUSHES, folder, tiny_base_folder, image)
        url = hub.url
    assert said.startswith("[["), said
    (refused, public, ink, not_hub, mine), names, pinned = json.loads(said.splitlines()[0])
    assert "Log in with" in refused and "me/refused" not in hub.repos
    assert "public, so nothing was uploaded" in public and "hub:OWNER/REPO" in not_hub
    assert ink.startswith(f"{url}/me/ink/commit/") and mine.startswith(f"{url}/me/mine/commit/")
    assert hub.repos["me/ink"][-1][1]["ink.safetensors"] == image.read_bytes()
    assert hub.private == {"me/open": False, "me/ink": False, "me/mine": True}
    sent = hub.repos["me/mine"][-1][1]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(sent)
    assert "card.json" not in sent and b"base_model_relation: adapter" in sent["README.md"]
    # What was fetched is the adapter that was there: the same content, under one more name.
    assert names == ["mine@1", "back@1"] and pinned
