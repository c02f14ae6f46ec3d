"""Hub models: ids, the offline sentences, and a real fetch from a hub on loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from haori.bases.hub import is_hub_id

COMMIT = "a" * 40


@pytest.mark.parametrize("spec", ["org/name", "HuggingFaceTB/SmolLM2-135M", "a/b.c_d-e"])
def test_hub_ids(spec: str) -> None:
    assert is_hub_id(spec)


@pytest.mark.parametrize("spec", ["name", "a/b/c", "./a", "/a", "~/a", "a/", "a/../b", "a/b c", "", "https://x/y"])
def test_other_specs_are_not_hub_ids(spec: str) -> None:
    assert not is_hub_id(spec)


class _Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a snapshot download uses."""

    files: dict[str, bytes] = {}

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path in ("/api/models/org/tiny/revision/main", f"/api/models/org/tiny/revision/{COMMIT}"):
            self.send({"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]})
        elif path.startswith("/api/models/org/tiny/tree/"):
            self.send([{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                       for name, data in self.files.items()])  # fmt: skip
        elif path.startswith("/org/tiny/resolve/") and path.split("/", 5)[5] in self.files:
            self.send(self.files[path.split("/", 5)[5]])
        elif path.startswith("/api/models/org/gated"):
            self.send({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/tiny"):
            self.send({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self.send({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        etag = hashlib.sha256(data).hexdigest()
        for key, value in {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(tiny_base_folder: Path) -> Iterator[str]:
    _Hub.files = {file.name: file.read_bytes() for file in tiny_base_folder.iterdir()}
    _Hub.files |= {
        "README.md": b"---\nlicense: llama3.2\n---\n",
        "pytorch_model.bin": b"\x80\x04never",
        "modeling_tiny.py": b"raise SystemExit('ran')",
        "tokenizer_code.py": b"raise SystemExit('ran')",
        "onnx/model.safetensors": b"other",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, os, shutil, sys
from haori import bases
from haori.core.errors import HaoriError

def attempt(spec, **options):
    try:
        base = bases.find_base(spec, **options)
    except HaoriError as error:
        return f"{type(error).__name__}: {error}"
    return [base.name, base.source, base.revision, base.licence, base.fingerprint.weights,
            sorted(str(p.relative_to(base.path)) for p in base.path.rglob("*"))]

out = [attempt(*spec) if isinstance(spec, list) else attempt(spec) for spec in json.loads(sys.argv[1])]
out.append(attempt("org/tiny", revision="nope"))
bases.add_base("org/tiny", name="kept")
out.append(attempt("kept"))
shutil.rmtree(os.environ["HF_HOME"])
out.append(attempt("kept")[:5])
print(json.dumps(out))
"""


def run(specs: list[str], **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(specs)],
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_hub_model_is_fetched_without_code_or_pickles(hub: str, tmp_path: Path, tiny_base_folder: Path) -> None:
    from haori import bases

    found, missing, gated, no_revision, kept, fetched_again = run(
        ["org/tiny", "org/absent", "org/gated"],
        HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="0",
    )  # fmt: skip
    weights = bases.find_base(str(tiny_base_folder)).fingerprint.weights
    licence = "LicenseRef-scancode-llama-3.2-license-2024"
    assert found[:5] == ["org/tiny", "hub:org/tiny", COMMIT, licence, weights]
    assert found[5] == sorted([*(file.name for file in tiny_base_folder.iterdir()), "README.md"])
    assert missing.startswith("BaseError: There is no folder 'org/absent', and the hub has no model of that id")
    assert gated.startswith("BaseError: The hub model 'org/gated' is gated")
    assert no_revision.startswith("BaseError: The hub model 'org/tiny' has no revision 'nope'")
    assert kept == ["kept", *found[1:]]
    assert fetched_again == ["kept", *found[1:5]]


def test_an_unreachable_hub_is_said_to_be_so(tmp_path: Path) -> None:
    code = (
        "from haori import bases\nfrom haori.core.errors import BaseError\n"
        "try:\n    bases.find_base('org/tiny')\nexcept BaseError as error:\n    print(error)"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("The hub model 'org/tiny' is not on this machine and the hub cannot be reached")
    assert len(done.stdout.splitlines()) == 1


@pytest.fixture
def pipeline_hub(hub: str, tmp_path: Path) -> tuple[str, Path]:
    """Serve a tiny Stable Diffusion as repositories hold it: pickles, code, variants and single files besides."""
    from tests.diffusion_pipelines import saved, stable_diffusion

    folder = saved(stable_diffusion(), tmp_path / "tiny")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index |= {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    (vae,) = [name for name in files if name.startswith("vae/") and name.endswith(".safetensors")]
    files[vae.replace(".safetensors", ".fp16.safetensors")] = files.pop(vae)
    files[vae.replace(".safetensors", ".other.safetensors")] = b"another variant"
    _Hub.files = files | {
        "unet/diffusion_pytorch_model.fp16.safetensors": b"a variant of what is there whole",
        "unet/diffusion_pytorch_model.bin": b"\x80\x04never",
        "unet/model.py": b"raise SystemExit('ran')",
        "v1-5.safetensors": b"everything in one file",
        "safety_checker/config.json": b"{}",
        "safety_checker/model.safetensors": b"not needed",
        "README.md": b"---\nlicense: mit\n---\n",
    }
    return hub, folder


def test_of_a_pipeline_the_parts_are_fetched_that_it_needs(pipeline_hub: tuple[str, Path], tmp_path: Path) -> None:
    from haori import bases

    hub, folder = pipeline_hub
    code = (
        "import json\nfrom haori import bases\nfrom haori.bases.diffusion import pipeline_of\n"
        "base = bases.find_base('org/tiny')\npipeline_of(base, dtype='fp32', device='cpu')\n"
        "print(json.dumps([base.pipeline, base.licence, {n: c.fingerprint.weights for n, c in base.components.items()},"
        " sorted(str(p.relative_to(base.path)) for p in base.path.rglob('*') if p.is_file())]))"
    )
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf")}
    for offline in ("0", "1"):  # the second time from the cache
        environment["HF_HUB_OFFLINE"] = offline
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        kind, licence, weights, files = json.loads(done.stdout)
        assert (kind, licence) == ("StableDiffusionPipeline", "MIT")
        local = bases.find_base(str(folder))
        assert weights == {name: part.fingerprint.weights for name, part in local.components.items()}
        stem = "diffusion_pytorch_model"
        held = {name for name in files if name.endswith((".safetensors", ".bin", ".py"))}
        assert held == {
            "text_encoder/model.safetensors", f"unet/{stem}.safetensors", f"vae/{stem}.fp16.safetensors",
        }  # fmt: skip
        assert not any(name.startswith("safety_checker") for name in files)
    del _Hub.files["text_encoder/model.safetensors"]
    _Hub.files["text_encoder/pytorch_model.bin"] = b"\x80\x04never"
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "other")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "holds 'text_encoder' only as a pickle, and pickles can run code" in done.stderr
