"""A test marked `alone` runs while every other worker of the same run waits, and the others run at once."""

import os
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import time
from pathlib import Path
import pytest

# Half of the tests are handed to each worker: both halves have one to run alone, between others.
@pytest.mark.parametrize("kind,number", [
    pytest.param("alone", number, marks=pytest.mark.alone) if number % 9 == 4 else ("beside", number)
    for number in range(18)
])
def test_it(kind, number):
    began = time.monotonic()
    time.sleep(0.2)
    Path(f"{kind}-{number}").write_text(f"{began} {time.monotonic()}")
"""


def test_alone_means_alone(tmp_path: Path):
    (tmp_path / "conftest.py").write_text("from tests.alone import pytest_runtest_protocol\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone: as in this project\n")
    (tmp_path / "test_times.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", "2", "--dist", "worksteal"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "--basetemp", tmp_path / "base"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert "18 passed" in done.stdout, done.stdout + done.stderr
    spans = {
        path.name: tuple(map(float, path.read_text().split()))
        for kind in ("alone", "beside")
        for path in tmp_path.glob(f"{kind}-*")
    }
    met = [pair for pair in combinations(spans, 2) if overlap(spans[pair[0]], spans[pair[1]])]
    assert not [pair for pair in met if any(name.startswith("alone") for name in pair)]
    assert met  # there were two workers


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def test_processes_can_be_interrupted_when_the_tests_are_a_background_job():
    child = "import signal; signal.raise_signal(signal.SIGINT)"
    code = (
        f"import tests.conftest, subprocess, sys; print(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    )
    done = subprocess.run(["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", code], cwd=ROOT,
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.stdout == f"{-signal.SIGINT}\n"
