"""Jobs in child processes: results, errors, sudden ends, and that no child outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from haori.core.errors import DataError, HaoriError
from haori.core.events import Said, Warned
from haori.jobs import JobResult, JobSpec, run_job
from tests.unit.job_tasks import EVENTS

TASKS = "tests.unit.job_tasks"


def spec(tmp_path: Path, name: str, **arguments) -> JobSpec:
    return JobSpec(task=f"{TASKS}:{name}", arguments=arguments, folder=tmp_path / "job")


def test_a_value_comes_back_and_every_event_before_it(tmp_path):
    heard = []
    wanted = spec(tmp_path, "echo", text="é", number=1.5).with_fields(environment={"HAORI_HOME": "/elsewhere"})
    result = run_job(wanted, on_event=heard.append)
    assert result.value == {"given": {"text": "é", "number": 1.5}, "home": "/elsewhere"}
    assert result.error is None
    assert heard == [event.with_fields(job="job") for event in EVENTS]
    log = (tmp_path / "job" / "log.txt").read_text()
    assert "printed by Python" in log
    assert "printed below it" in log
    assert JobResult.model_validate_json((tmp_path / "job" / "result.json").read_bytes()) == result
    assert JobSpec.model_validate_json((tmp_path / "job" / "job.json").read_bytes()) == wanted


def test_lines_that_are_no_events_are_kept_in_the_log_and_unknown_kinds_counted(tmp_path):
    unknown = '{"kind": "drawn", "picture": "a.png"}'
    lines = ["printed by a library", "[1, 2]", '{"no": "kind"}', unknown, unknown, '{"kind": "said"}']
    heard = []
    assert run_job(spec(tmp_path, "write_to_the_channel", lines=lines), on_event=heard.append).require() == {}
    assert heard == [
        Said(text="before", job="job"),
        Said(text="after", job="job"),
        Warned(text="Events of the kind 'drawn', which this version cannot read, were skipped: 2.", job="job"),
        Warned(text="Events of the kind 'said', which this version cannot read, were skipped: 1.", job="job"),
    ]
    assert (tmp_path / "job" / "log.txt").read_text().splitlines() == lines[:3]


def test_what_a_subscriber_raises_ends_the_child_and_is_raised(tmp_path):
    def refuse(event):
        raise KeyError(event.text)

    with pytest.raises(KeyError, match="asleep"):
        run_job(spec(tmp_path, "sleep", file=str(tmp_path / "pid")), on_event=refuse)
    assert not alive(int((tmp_path / "pid").read_text()))


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
