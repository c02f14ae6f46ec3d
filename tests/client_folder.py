"""Real clients of the server, for tests: installed once, without their dependencies, beside the cache of pytest.

They may want other versions of what Haori needs, so they never come into its environment; a process that is to use them
gets the folder in front of its path.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from haori.core.lock import file_lock

ROOT = Path(__file__).parents[1]


def installed(name, requirements):
    """Return the folder of a client, which the first test that asks for it installs."""
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = ROOT / ".pytest_cache" / f"{name}-{wanted}"
    folder.parent.mkdir(exist_ok=True)
    with file_lock(folder.with_suffix(".lock"), holds="clients"):
        if not folder.is_dir():
            stage = folder.with_suffix(".stage")
            shutil.rmtree(stage, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(stage)]
            done = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            stage.rename(folder)
    return folder


def environment_of(folder, **more):
    """Return the variables of a process that uses a client, with `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HAORI_")}
    path = os.pathsep.join([str(folder), str(ROOT)])
    return kept | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"} | more


def finish(process, timeout_s):
    """Wait for a process and return what it wrote; one that fails fails the test."""
    try:
        said, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, said[-6000:]
    return said
