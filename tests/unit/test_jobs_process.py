"""Jobs in child processes: results, errors, sudden ends, and that no child outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from haori.core.errors import DataError, HaoriError
from haori.jobs import JobResult, JobSpec, run_job

TASKS = "tests.unit.job_tasks"


def spec(tmp_path: Path, name: str, **arguments) -> JobSpec:
    return JobSpec(task=f"{TASKS}:{name}", arguments=arguments, folder=tmp_path / "job")


def test_a_value_comes_back_with_lines_and_progress(tmp_path):
    lines, shown = [], []
    wanted = spec(tmp_path, "echo", text="é", number=1.5).with_fields(environment={"HAORI_HOME": "/elsewhere"})
    result = run_job(wanted, say=lines.append, show=shown.append)
    assert result.value == {"given": {"text": "é", "number": 1.5}, "home": "/elsewhere"}
    assert result.error is None
    assert (lines, shown) == (["hello\nthere"], [{"step": 1}])
    log = (tmp_path / "job" / "log.txt").read_text()
    assert "printed by Python" in log
    assert "printed below it" in log
    assert JobResult.model_validate_json((tmp_path / "job" / "result.json").read_bytes()) == result
    assert JobSpec.model_validate_json((tmp_path / "job" / "job.json").read_bytes()) == wanted


def test_an_error_of_the_child_is_its_sentence_and_class(tmp_path):
    result = run_job(spec(tmp_path, "refuse"))
    assert (result.value, result.error, result.kind) == (None, "row 3 is empty.", "DataError")
    with pytest.raises(DataError, match=r"^row 3 is empty\.$"):
        result.require()


@pytest.mark.parametrize(
    ("name", "words"),
    [("crash", "KeyError: 'rank'"), ("die", "memory ran out"), ("leave", "exit code 3"), ("absent", "absent")],
)
def test_an_unexpected_end_is_a_sentence_and_never_a_result(tmp_path, name, words):
    result = run_job(spec(tmp_path, name))
    assert result.value is None
    assert words in result.error
    assert "\n" not in result.error
    with pytest.raises(HaoriError):
        result.require()


def test_the_peak_of_a_child_does_not_hold_that_of_its_parent(tmp_path):
    code = (
        "from pathlib import Path; from haori.jobs import JobSpec, run_job; held = bytearray(b'x') * 500_000_000; "
        f"print(run_job(JobSpec(task='{TASKS}:peak', folder=Path({str(tmp_path)!r}))).require()['bytes'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(done.stdout) < 4e8


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_its_parent(tmp_path, number):
    file = tmp_path / "pid"
    code = (
        "from pathlib import Path; from haori.jobs import JobSpec, run_job; "
        f"run_job(JobSpec(task='{TASKS}:sleep', folder=Path({str(tmp_path)!r}), arguments={{'file': {str(file)!r}}}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    wait_for(lambda: file.is_file() and file.read_text())
    child = int(file.read_text())
    assert alive(child)
    parent.send_signal(number)
    assert parent.wait(30) != 0
    wait_for(lambda: not alive(child))
