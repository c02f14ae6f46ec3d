"""Converts a pickled checkpoint (.pt, .bin, .ckpt) into safetensors, in a process that can do nothing else.

Reading a pickle runs what it says. The file is read by `reading.py`, a process with an empty environment,
torch's `weights_only` reader, and limits on memory, time and output; this one never unpickles anything.
"""

import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from haori.core.errors import FileFormatError, InputError
from haori.core.safetensors_header import read_safetensors_header
from haori.core.storage import staged_file

__all__ = ["Converted", "convert_pickle"]

_TIMEOUT_S = 300
_ENTRY_LIMIT = 100_000
_SPARE_BYTES = 1 << 30
_ANSWER_LIMIT = 1 << 20


class Converted(NamedTuple):
    """What a pickle became.

    Attributes:
        path: The safetensors file.
        tensors: Number of tensors.
        left_out: Names of what else the pickle held, such as an optimizer's state.
    """

    path: Path
    tensors: int
    left_out: tuple[str, ...]


def convert_pickle(path: Path, out: Path, *, timeout_s: float = _TIMEOUT_S) -> Converted:
    """Write the tensors of a pickled checkpoint as a new safetensors file.

    Args:
        path: The pickle, as torch.save writes it: a zip archive, or a plain pickle of older versions.
        out: The new file, whose name ends in .safetensors; written beside it and renamed.
        timeout_s: Seconds after which the process is ended.

    Raises:
        FileFormatError: It is no checkpoint, asks for more than tensors, for too much memory or too long, or holds no
            tensors.
        InputError: `out` exists or is called otherwise, or the system has no limits for a process.
    """
    if not path.is_file():
        raise FileFormatError(f"There is no file {str(path)!r}.")
    if out.suffix != ".safetensors":
        raise InputError(f"{str(out)!r} must end in .safetensors.")
    if out.exists():
        raise InputError(f"{str(out)!r} already exists; choose a new file.")
    if not Path("/proc/self/statm").is_file():
        raise InputError("Pickles are converted on Linux only, where a process can be kept within limits.")
    _check_archive(path)
    size = path.stat().st_size
    with staged_file(out) as stage:
        answer = _answer(path, stage, timeout_s, memory=4 * size + _SPARE_BYTES, output=4 * size + (1 << 20))
        if "error" in answer:
            raise _bad(path, str(answer["error"])[:400])
        read_safetensors_header(stage)
    return Converted(out, int(answer["tensors"]), tuple(str(name) for name in answer["left_out"]))


def _answer(path: Path, stage: Path, timeout_s: float, *, memory: int, output: int) -> dict[str, Any]:
    limits = [str(number) for number in (math.ceil(timeout_s), memory, output)]
    reader = Path(__file__).with_name("reading.py")
    command = [sys.executable, "-I", "-B", str(reader), str(path.resolve()), str(stage.resolve()), *limits]
    with tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=empty,
            env={"HOME": empty, "TMPDIR": empty}, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise _bad(path, f"it was not read within {timeout_s} seconds") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
    try:
        answer = json.loads(said[:_ANSWER_LIMIT])
    except ValueError:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        raise _bad(
            path,
            f"the process that read it ended without an answer ({how}); it may have needed more memory than it got",
        ) from None
    if not isinstance(answer, dict) or not ("error" in answer or {"tensors", "left_out"} <= answer.keys()):
        raise _bad(path, "the process that read it gave no proper answer")
    return answer


def _check_archive(path: Path) -> None:
    """Refuse a zip archive as torch.save writes none: with entries that are packed, or larger than the file."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise _bad(path, f"it is a damaged zip archive ({str(error)[:100]})") from None
    if len(entries) > _ENTRY_LIMIT:
        raise _bad(path, f"it has {len(entries):,} entries; at most {_ENTRY_LIMIT:,} are accepted")
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise _bad(path, f"its entry {packed[0][:80]!r} is compressed, which torch never does: it may be a zip bomb")
    claimed = sum(entry.file_size for entry in entries)
    if claimed > path.stat().st_size:
        raise _bad(path, f"its entries claim {claimed:,} bytes, more than the file has: it may be a zip bomb")


def _bad(path: Path, reason: str) -> FileFormatError:
    return FileFormatError(f"{str(path)!r} cannot be converted: {reason}.")
