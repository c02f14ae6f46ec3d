"""Real pip against a real index on loopback (or a folder of files), in the user's way: by environment variables."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from haori.core.errors import DownloadError, StorageError
from haori.core.package_index import download
from haori.core.settings import settings

WHEEL = "tiny_model-1.0-py3-none-any.whl"
SOURCE = "tiny-source-1.0.tar.gz"


def build_wheel(folder: Path, payload: bytes = b"weights" * 1000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tiny_model/data.bin", payload)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder / WHEEL


def build_source(folder: Path, marker: Path) -> Path:
    """Write an archive whose set-up code could only leave a mark or fail."""
    folder.mkdir(parents=True, exist_ok=True)
    code = f"open({str(marker)!r}, 'w').write('ran')\nraise SystemExit('no')\n".encode()
    files = {"setup.py": code, "PKG-INFO": b"Metadata-Version: 1.0\nName: tiny-source\nVersion: 1.0\n"}
    with tarfile.open(folder / SOURCE, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"tiny-source-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return folder / SOURCE


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def facts(file: Path) -> dict[str, object]:
    data = file.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "filename": file.name, "size_bytes": len(data)}


@pytest.fixture(autouse=True)
def plain_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    return tmp_path / "links"


class _Index(SimpleHTTPRequestHandler):
    """Serves a folder; a file called `*.slow` beside the one asked for makes the answer stop half-way."""

    def log_message(self, *args: object) -> None:
        pass

    def copyfile(self, source, outputfile) -> None:
        path = Path(self.translate_path(self.path))
        if not path.with_name(path.name + ".slow").exists():
            super().copyfile(source, outputfile)
        else:
            outputfile.write(source.read(1000))
            outputfile.flush()
            time.sleep(30)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "index"
    for package, name in (("tiny-model", WHEEL), ("tiny-source", SOURCE)):
        (root / "simple" / package).mkdir(parents=True)
        (root / "simple" / package / "index.html").write_text(f'<a href="/files/{name}">{name}</a>')
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Index, directory=str(root)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield root / "files"
    server.shutdown()
    server.server_close()


def test_a_wheel_is_fetched_once(links: Path, tmp_path: Path) -> None:
    wheel = build_wheel(links)
    into = tmp_path / "into"
    found = download("tiny-model==1.0", **facts(wheel), into=into)
    assert found == into / WHEEL
    assert found.read_bytes() == wheel.read_bytes()
    assert names(into) == [WHEEL]
    known = facts(wheel)
    wheel.unlink()
    assert download("tiny-model==1.0", **known, into=into) == found


def test_pip_is_found_where_distutils_was_imported_before(
    links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import _distutils_hack  # of setuptools, which installs this hook when the interpreter starts

    monkeypatch.setitem(sys.modules, "distutils", types.ModuleType("distutils"))
    monkeypatch.setattr(sys, "meta_path", [_distutils_hack.DistutilsMetaFinder(), *sys.meta_path])
    wheel = build_wheel(links)
    assert download("tiny-model==1.0", **facts(wheel), into=tmp_path / "into").is_file()


def test_other_content_is_thrown_away(links: Path, tmp_path: Path) -> None:
    wheel = build_wheel(links)
    expected = {**facts(wheel), "sha256": "0" * 64}
    with pytest.raises(DownloadError, match="other content than expected"):
        download("tiny-model==1.0", **expected, into=tmp_path / "into")
    assert names(tmp_path / "into") == []


def test_a_damaged_copy_is_fetched_again(links: Path, tmp_path: Path) -> None:
    wheel = build_wheel(links)
    (tmp_path / WHEEL).write_bytes(b"half")
    assert download("tiny-model==1.0", **facts(wheel), into=tmp_path).read_bytes() == wheel.read_bytes()


def test_an_unknown_package_is_named(links: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"does not offer tiny-model==1\.0"):
        download("tiny-model==1.0", sha256="0" * 64, filename=WHEEL, size_bytes=1, into=tmp_path / "into")
    assert names(tmp_path / "into") == []


def test_an_unreachable_index_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError, match="index cannot be reached"):
        download("tiny-model==1.0", sha256="0" * 64, filename=WHEEL, size_bytes=1, into=tmp_path)


def test_offline_is_honoured(links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = build_wheel(links)
    monkeypatch.setenv("HAORI_OFFLINE", "1")
    settings.cache_clear()
    with pytest.raises(DownloadError, match="HAORI_OFFLINE is set"):
        download("tiny-model==1.0", **facts(wheel), into=tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_missing_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Taking pip out of the environment that runs the tests would break it for the others.
    monkeypatch.setattr(PathFinder, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        download("tiny-model==1.0", sha256="0" * 64, filename=WHEEL, size_bytes=1, into=tmp_path)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        download("tiny-model==1.0", sha256="0" * 64, filename=WHEEL, size_bytes=1, into=tmp_path / "file" / "sub")


def test_a_source_archive_is_taken_without_building_it(index: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    source = build_source(index, marker)
    found = download("tiny-source==1.0", **facts(source), into=tmp_path / "into")
    assert found.read_bytes() == source.read_bytes()
    assert names(tmp_path / "into") == [SOURCE]
    assert not marker.exists()


def test_a_source_archive_with_other_content_is_refused(index: Path, tmp_path: Path) -> None:
    source = build_source(index, tmp_path / "marker")
    with pytest.raises(DownloadError, match="other content than expected"):
        download("tiny-source==1.0", **{**facts(source), "sha256": "1" * 64}, into=tmp_path / "into")
    assert names(tmp_path / "into") == []


def test_an_interrupt_leaves_nothing_behind(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, os.urandom(200_000))
    wheel.with_name(wheel.name + ".slow").touch()
    into = tmp_path / "into"
    known = facts(wheel)
    code = (
        "from pathlib import Path\nfrom haori.core.package_index import download\n"
        f"download('tiny-model==1.0', into=Path({str(into)!r}), **{known!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (begun := list(into.glob(f".download.*/tmp/**/{WHEEL}"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert begun
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert names(into) == []
