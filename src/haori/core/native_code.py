"""Compiles kernels in C with the machine's own compiler, once, and loads them.

No compiler, or one that fails, is no error: plain torch does the same work, more slowly. A library is kept in the
cache, under a name made from its source, the compiler and the processor.
"""

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from haori.core.settings import settings
from haori.core.storage import make_folder

__all__ = ["NativeCode", "native_code", "openmp_path"]

_HEADERS = Path(__file__).parent
# No -lgomp: the OpenMP functions are those of the runtime that torch has loaded.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", "-nostdlib")
_LIMIT_S = 120


class NativeCode(NamedTuple):
    """A compiled library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


@cache
def native_code(source: Path) -> NativeCode:
    """Return a C file as a library, compiled now or earlier. It may include the headers that lie in this folder."""
    if platform.system() != "Linux":
        return NativeCode(None, "kernels are compiled on Linux only")
    if not settings().native:
        return NativeCode(None, "HAORI_NATIVE is off")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return NativeCode(None, "there is no C compiler (cc) on this machine")
    runtime = openmp_path()
    if runtime is None:
        return NativeCode(None, "torch came without an OpenMP runtime")
    try:
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        return NativeCode(ctypes.CDLL(str(_library(compiler, source))))
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return NativeCode(None, f"{Path(compiler).name} failed: {''.join(last)[:200]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return NativeCode(None, f"the kernels could not be compiled or loaded: {error}")


@cache
def openmp_path() -> Path | None:
    """Return the OpenMP runtime that came with torch, if it is GNU's."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    return next(iter(sorted((Path(torch.origin).parent / "lib").glob("libgomp*.so*"))), None)


def _library(compiler: str, source: Path) -> Path:
    """Return the compiled library, made if it is not in the cache."""
    identity = hashlib.sha256()
    for file in (source, *sorted(_HEADERS.glob("*.h"))):
        identity.update(file.read_bytes())
    identity.update(repr((compiler, Path(compiler).stat().st_mtime_ns, _FLAGS, _processor())).encode())
    place = settings().cache / "native" / f"{source.stem}-{identity.hexdigest()[:16]}.so"
    if not place.is_file():
        make_folder(place.parent)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / "kernels.so"
            command = [compiler, *_FLAGS, f"-I{_HEADERS}", "-o", str(made), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT_S, stdin=subprocess.DEVNULL)
            made.replace(place)
    return place


def _processor() -> str:
    """Return what -march=native looks at: the processor's features."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
