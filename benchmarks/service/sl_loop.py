"""The cookbook's supervised loop, unmodified, against our server and against a row-by-row one of stock PEFT.

    sl_loop_step_ratio    median seconds of a step there, of the better of two number formats, over those here

Both get the same rows: reviews of the demo's data as questions with one-word answers, eight in a step, rank 16. Runs
alternate, each in a fresh session; a run's first step, which warms up, is left out. The loop runs in a process with the
clients of tests/tinker-requirements.txt on its path.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submit

__all__ = ["sl_loop"]

HERE = Path(__file__).parent
MODEL = "Qwen/Qwen3-4B-Instruct-2507"  # a name that the cookbook knows; an alias of the base here
FORMATS = ("float32", "bfloat16")
BATCH, RANK = 8, 16


def sl_loop(home: Path, base: str, *, steps: int, rounds: int) -> dict[str, Any]:
    """Measure.

    Args:
        home: A new folder.
        base: A base's name.
        steps: Of each run, the one that warms up included.
        rounds: Runs of each server.
    """
    from haori.bases import find_base

    home.mkdir(parents=True, exist_ok=True)
    os.environ["HAORI_MODEL_ALIASES"] = json.dumps({MODEL: base})
    rows, clients, tokenizer = _rows(home, steps), _clients(home), str(find_base(base).path)
    times: dict[str, list[float]] = {"haori": [], **{name: [] for name in FORMATS}}
    losses: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, taken in times.items():
            with submit.server(home / f"{name}-{number}", base) if name == "haori" else _stock(base, name) as url:
                log = home / f"log-{name}-{number}"
                arguments = [tokenizer, MODEL, str(rows), f"base_url={url}", f"batch_size={BATCH}"]
                arguments += [f"lora_rank={RANK}", f"log_path={log}", "learning_rate=5e-4", "save_every=0"]
                _run(clients, arguments)
            lines = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
            lines = [line for line in lines if "time_total" in line]
            taken += [line["time_total"] for line in lines[1:]]
            losses[name] = [round(line["train_mean_nll"], 3) for line in lines]
            print(f"  {name}: {statistics.median(taken):.2f} s a step", file=sys.stderr, flush=True)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "base": base, "rows_a_step": BATCH, "rank": RANK, "steps": steps, "rounds": rounds,
        "step_s": {name: {"median": round(medians[name], 3), "all": [round(one, 3) for one in taken]}
                   for name, taken in times.items()},
        "train_mean_nll": losses,
        "sl_loop_step_ratio": round(min(medians[name] for name in FORMATS) / medians["haori"], 2),
    }  # fmt: skip


def _rows(home: Path, steps: int) -> Path:
    from importlib.resources import files

    lines = (files("haori.data") / "samples" / "reviews.jsonl").read_text().splitlines()
    reviews = [json.loads(line) for line in lines[: BATCH * steps]]
    asked = "Is this review of a film positive or negative? Answer with one word.\n\n"
    rows = [
        {"messages": [{"role": "user", "content": asked + review["text"]},
                      {"role": "assistant", "content": "positive" if review["positive"] else "negative"}]}
        for review in reviews
    ]  # fmt: skip
    place = home / "rows.jsonl"
    place.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return place


def _clients(home: Path) -> Path:
    """Install the clients into a folder."""
    place = home / "clients"
    wanted = HERE.parents[1] / "tests" / "tinker-requirements.txt"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
    subprocess.run([*command, "-r", str(wanted)], check=True)
    return place


def _run(clients: Path, arguments: list[str]) -> None:
    variables = {
        **os.environ, "PYTHONPATH": str(clients), "TINKER_TELEMETRY": "0", "TINKER_API_KEY": "tml-local",
        "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(HERE / "sl_recipe.py"), *arguments],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"The loop failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


@contextmanager
def _stock(base: str, dtype: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "stock_server.py"), base, dtype], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()
