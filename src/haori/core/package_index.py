"""Fetches one pinned file from the user's package index, through the user's own pip.

pip's settings (index, mirror, proxy, certificates, cache) hold, so no host is named here. The file is pinned
by version and SHA-256 and checked by pip and once more here. Nothing is installed, and dependencies are not
followed. A source archive is taken as soon as it has arrived whole, before pip goes on to build it.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from pathlib import Path

from haori.core.errors import DownloadError, StorageError
from haori.core.settings import settings
from haori.core.storage import explain_os_errors, make_folder

__all__ = ["download"]

STALL_LIMIT_S = 600.0
_POLL_S = 0.1
_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|SSLError|"
    r"Connection(?:Reset|Refused|Aborted)?Error|Connection (?:broken|refused|reset)|IncompleteRead|"
    r"Name or service not known|name resolution|timed out|No route to host|Network is unreachable",
    re.IGNORECASE,
)
_MISMATCH = re.compile(r"DO NOT MATCH THE HASHES|hash(?:es)? (?:mismatch|don't match|do not match)", re.IGNORECASE)
_ABSENT = re.compile(r"No matching distribution found|Could not find a version|404 Client Error")
_FULL = re.compile(r"No space left on device|Errno 28|disk quota exceeded", re.IGNORECASE)


def download(requirement: str, *, sha256: str, filename: str, size_bytes: int, into: Path) -> Path:
    """Fetch `filename` of the pinned `requirement` into the folder `into`, and return its path.

    A file that is already there with the right content is returned at once. Progress goes to standard error.

    Args:
        requirement: Name and version, as `name==1.2.3`.
        sha256: Expected hash of the file, in hex.
        filename: The file of that release, a wheel or a source archive.
        size_bytes: Its size, for the progress bar.
        into: The folder it goes to; created when absent.

    Raises:
        DownloadError: Offline, pip is missing, or the file is not found, not reachable or not as expected.
        StorageError: The disk is full or the folder is not writable.
    """
    final = into / filename
    if final.is_file() and _sha256(final) == sha256:
        return final
    if settings().offline:
        raise DownloadError(
            f"{requirement} is not on this machine and HAORI_OFFLINE is set; "
            "unset it to fetch the package once through pip."
        )
    # PathFinder, since the hook of setuptools for "pip" warns where distutils has been imported before.
    if PathFinder.find_spec("pip") is None:
        raise DownloadError(
            f"{requirement} is fetched with pip, which {sys.executable!r} does not have; "
            f"run `{sys.executable} -m ensurepip` and try again."
        )
    make_folder(into)
    stage = Path(tempfile.mkdtemp(dir=into, prefix=".download."))
    try:
        with explain_os_errors(into):
            found = _fetch(requirement, sha256, filename, size_bytes, stage)
            found.chmod(0o644)
            found.replace(final)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return final


def _fetch(requirement: str, sha256: str, filename: str, size_bytes: int, stage: Path) -> Path:
    """Run pip inside `stage` and return the checked file there."""
    temporary, out, log = stage / "tmp", stage / "out", stage / "log.txt"
    temporary.mkdir()
    out.mkdir()
    pinned = stage / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    is_wheel = filename.endswith(".whl")
    package = requirement.partition("==")[0]
    command = [
        sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input",
        "--disable-pip-version-check", "-vv", "--progress-bar", "off", "--dest", str(out),
        "--only-binary" if is_wheel else "--no-binary", package, "-r", str(pinned),
    ]  # fmt: skip
    private = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    environment = {**os.environ, **private, "PYTHONWARNINGS": "ignore", "LC_ALL": "C.UTF-8"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    arrived = out / filename
    try:
        with _progress(package, size_bytes) as advance:
            early = None if is_wheel else stage / filename
            if _watch(process, temporary, early, sha256, advance):
                arrived = stage / filename
            elif process.returncode != 0 or not arrived.is_file():
                raise _explain(requirement, log.read_text(encoding="utf-8", errors="replace"), stage.parent)
            advance(size_bytes)
    finally:
        _stop(process)
    actual = _sha256(arrived)
    if actual != sha256:
        raise DownloadError(
            f"pip returned {filename} with other content than expected (sha256 {actual[:12]}, "
            f"not {sha256[:12]}), so it was thrown away; check your index or mirror."
        )
    return arrived


def _watch(
    process: "subprocess.Popen[bytes]",
    temporary: Path,
    early: Path | None,
    sha256: str,
    advance: Callable[[int], None],
) -> bool:
    """Report growth until pip ends; with `early`, return True as soon as the file of that name is whole there.

    pip keeps a second copy of what it downloads for its cache, so the largest file is what has arrived.
    """
    largest, last_growth = 0, time.monotonic()
    while True:
        running = process.poll() is None
        size = 0
        for path, path_size in _files(temporary):
            size = max(size, path_size)
            if early is not None and path.name == early.name and not early.exists():
                # A second name for the growing file: it stays when pip cleans up after a failed build.
                with suppress(OSError):
                    os.link(path, early)
        if size > largest:
            largest, last_growth = size, time.monotonic()
            advance(size)
        if early is not None and early.exists() and _sha256(early) == sha256:
            return True
        if not running:
            return False
        if time.monotonic() - last_growth > STALL_LIMIT_S:
            raise DownloadError(
                f"The package index sent nothing for {STALL_LIMIT_S:.0f} seconds; "
                "check the network (or your proxy) and try again."
            )
        time.sleep(_POLL_S)


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            with suppress(OSError):
                yield path, path.stat().st_size


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End pip and whatever it started, if it still runs."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _progress(package: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and time left on standard error; yield what sets the bytes so far."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as RateColumn

    columns = TextColumn("Fetching {task.description}"), BarColumn(None), DownloadColumn(), RateColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(package, total=size_bytes)
        yield lambda size: progress.update(task, completed=min(size, size_bytes))


def _explain(requirement: str, log: str, into: Path) -> DownloadError | StorageError:
    """Turn pip's output into one sentence."""
    if _FULL.search(log):
        return StorageError(f"Cannot write {str(into)!r}: the disk is full; free some space or choose another folder.")
    if _MISMATCH.search(log):
        return DownloadError(
            f"The package index returned {requirement} with other content than expected (its SHA-256 "
            "differs), so it was thrown away; check your index or mirror."
        )
    if _NETWORK.search(log):
        return DownloadError(
            f"{requirement} could not be fetched because the package index cannot be reached; "
            "check the network, the proxy and `pip config list`, and try again."
        )
    if _ABSENT.search(log):
        return DownloadError(
            f"Your package index does not offer {requirement}; see `pip config list` for the index in use, "
            "or try again on a machine that reaches a fuller one."
        )
    lines = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    reason = (lines[-1] if lines else (log.strip().splitlines() or ["pip said nothing"])[-1]).rstrip(".")
    return DownloadError(f"pip could not fetch {requirement}: {reason[:300]}.")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
