"""Compiles the kernels with the machine's own C compiler, once, and loads them.

No compiler, or one that fails, is no error: plain torch does the same work, more slowly. The library is kept in the
cache, under a name made from the source, the compiler and the processor.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from haori.core.settings import settings
from haori.core.storage import make_folder
from haori.serve.openmp import openmp_path

__all__ = ["Compiled", "compiled"]

_SOURCE = Path(__file__).with_name("kernels.c")
# No -lgomp: the OpenMP functions are those of the runtime that torch has loaded.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", "-nostdlib")
_LIMIT_S = 120


class Compiled(NamedTuple):
    """The library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


@lru_cache(maxsize=1)
def compiled() -> Compiled:
    """Return the kernels, compiled now or earlier."""
    if platform.system() != "Linux":
        return Compiled(None, "they are compiled on Linux only")
    if not settings().native:
        return Compiled(None, "HAORI_NATIVE is off")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return Compiled(None, "there is no C compiler (cc) on this machine")
    runtime = openmp_path()
    if runtime is None:
        return Compiled(None, "torch came without an OpenMP runtime")
    try:
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        return Compiled(ctypes.CDLL(str(_library(compiler))))
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return Compiled(None, f"{Path(compiler).name} failed: {''.join(last)[:200]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Compiled(None, f"they could not be compiled or loaded: {error}")


def _library(compiler: str) -> Path:
    """Return the compiled library, made if it is not in the cache."""
    identity = hashlib.sha256(_SOURCE.read_bytes())
    identity.update(repr((compiler, Path(compiler).stat().st_mtime_ns, _FLAGS, _processor())).encode())
    place = settings().cache / "native" / f"kernels-{identity.hexdigest()[:16]}.so"
    if not place.is_file():
        make_folder(place.parent)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / "kernels.so"
            command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT_S, stdin=subprocess.DEVNULL)
            made.replace(place)
    return place


def _processor() -> str:
    """Return what -march=native looks at: the processor's features."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
