"""benchmarks/gpu/run.sh, every line of it on the CPU with tiny shapes; and what it makes of parts that go wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
EVERY_LINE = "environment,tests,1B-lora,profile,serving,8B-nf4"  # 8B-lora runs the lines of 1B-lora


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("HAORI_HOME", None)
    return subprocess.run(
        ["bash", FOLDER / "run.sh", *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(900)
def test_every_part_runs_on_the_cpu_with_tiny_shapes(tmp_path: Path):
    done = run_script("--shapes", "tiny", "--out", str(tmp_path), "--seconds", "850", "--only", EVERY_LINE)
    result = json.loads(done.stdout.splitlines()[-1])
    log = (tmp_path / "log.txt").read_text()
    assert {name: found.get("failed") for name, found in result["parts"].items()} == dict.fromkeys(
        EVERY_LINE.split(",")
    ), log[-4000:]
    assert done.returncode == 0
    parts = result["parts"]
    assert parts["tests"]["tests"] > 40
    assert parts["tests"]["failures"] == parts["tests"]["errors"] == 0
    for name in ("1B-lora", "8B-nf4"):
        assert parts[name]["cases"][name]["haori"]["tokens_per_s"] > 0
        assert parts[name]["cases"][name]["peft"]["sdpa"]["peak_bytes"] > 0
    assert parts["serving"]["adapters8"]["ratio"] > 0
    assert len(parts["profile"]["longest"]) == 10
    assert "Self CPU" in (tmp_path / "profile.txt").read_text()
    assert json.loads((tmp_path / "results.json").read_text()) == result


def test_a_part_for_which_no_time_is_left_is_said_to_be_missing(tmp_path: Path):
    done = run_script("--shapes", "tiny", "--out", str(tmp_path), "--seconds", "5", "--only", "environment,8B-lora")
    assert done.returncode == 1
    parts = json.loads(done.stdout.splitlines()[-1])["parts"]
    assert {found["failed"] for found in parts.values()} == {"not begun: 5 s were over"}


def test_an_unknown_part_is_refused_by_name(tmp_path: Path):
    done = run_script("--out", str(tmp_path), "--only", "9B-lora")
    assert done.returncode == 2
    assert "'9B-lora'" in done.stdout


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import sys; print('why'); sys.exit(3)", "exit code 3"),
        ("import time; print('why', flush=True); time.sleep(60)", "not done after 2 s"),
        ("print('why')", "no result"),
    ],
)
def test_a_part_that_goes_wrong_says_how_and_leaves_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, failure: str
):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    import run

    found = run.run_part(run.Part("x", ("-c", code), 2), 2, tmp_path / "log.txt", dict(os.environ))
    monkeypatch.delitem(sys.modules, "run")
    assert found["failed"] == failure
    assert found["last_lines"] == ["why"]
