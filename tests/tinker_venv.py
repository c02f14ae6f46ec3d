"""The real clients of the training API, for tests: installed once, in a folder beside the cache of pytest.

They cap transformers below what Haori needs, so they are installed without their dependencies and never into the
environment of Haori; a process that is to use them gets the folder in front of its path.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from haori.core.lock import file_lock

_REQUIREMENTS = Path(__file__).with_name("tinker-requirements.txt")
_ROOT = Path(__file__).parents[1]


class TinkerClients:
    """Runs programs that import `tinker` and `tinker_cookbook`."""

    def __init__(self, folder):
        self.folder = folder

    def start(self, script, *arguments, **environment):
        """Start a script; `environment` adds variables."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("HAORI_")}
        variables |= {
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(_ROOT)]), "TINKER_TELEMETRY": "0",
            "TINKER_API_KEY": "tml-local", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **environment,
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=variables,
        )  # fmt: skip

    def run(self, script, *arguments, timeout_s=60, **environment):
        """Run a script to its end and return what it wrote; one that fails fails the test."""
        process = self.start(script, *arguments, **environment)
        try:
            said, _ = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        assert process.returncode == 0, said[-6000:]
        return said


@pytest.fixture(scope="session")
def tinker_clients():
    """The clients; the first test that asks for them installs them."""
    wanted = hashlib.sha256(_REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = _ROOT / ".pytest_cache" / f"tinker-{wanted}"
    folder.parent.mkdir(exist_ok=True)
    with file_lock(folder.with_suffix(".lock"), holds="clients"):
        if not folder.is_dir():
            stage = folder.with_suffix(".stage")
            shutil.rmtree(stage, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(stage)]
            done = subprocess.run([*command, "-r", str(_REQUIREMENTS)], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            stage.rename(folder)
    return TinkerClients(folder)
