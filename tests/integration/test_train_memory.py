"""Memory that runs out for real, in a process with a limit: a sentence with settings that help, and they do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from haori.core.out_of_memory import is_out_of_memory, requested_bytes
from haori.tasks.recipe import recipe_from
from haori.training import prepare
from haori.training.memory import current_memory_bytes, peak_memory_bytes, size_in_words
from haori.training.out_of_memory import Usage, remedies
from tests.conftest import build_tiny_base

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")

ROWS = 400
CHILD = """
import resource, sys
import haori
from haori.core.errors import HaoriError
from haori.training import prepare, train_run

base, data, limit, *overrides = sys.argv[1:]
recipe = haori.api.recipe_of(None, base, data, "x", overrides)
prepared = prepare(recipe)
import accelerate, bitsandbytes, peft, transformers  # what a run imports is not what it computes with
if int(limit):
    line = next(line for line in open("/proc/self/status") if line.startswith("VmData:"))
    bound = int(line.split()[1]) * 1024 + int(limit)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
try:
    run = train_run(recipe, prepared=prepared)
except HaoriError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(run.record.status)
"""


@pytest.fixture(scope="module")
def long_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "data.jsonl"
    words = "is this review positive or negative answer the question user system "
    rows = [{"prompt": f"{i} {words * 3}", "completion": "positive"} for i in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def child(home: Path, base: Path, data: Path, limit_bytes: int, *overrides: str) -> "subprocess.CompletedProcess[str]":
    import os

    return subprocess.run(
        [sys.executable, "-c", CHILD, str(base), str(data), str(limit_bytes), *overrides],
        env={**os.environ, "HAORI_HOME": str(home)}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip


LIMIT = 200_000_000
SETTINGS = ["training.max_steps=2", "training.batch_tokens=20000", "training.dtype=fp32", "method.rank=4"]


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_an_exhausted_memory_is_a_sentence_whose_advice_works(haori_home, tiny_base_folder, long_data, kind):
    settings = [*SETTINGS, f"method.kind={kind}"] if kind == "lora" else [*SETTINGS[:-1], f"method.kind={kind}"]
    failed = child(haori_home, tiny_base_folder, long_data, LIMIT, *settings, "training.micro_batch_tokens=20000")
    assert failed.returncode == 1, failed.stderr
    said = failed.stderr.strip().splitlines()[-1]
    assert re.match(r"TrainingError: Out of memory after step [01]: ", said), failed.stderr
    assert "Traceback" not in failed.stderr
    assert "could not be had" in said
    assert "training.micro_batch_tokens=10000 (about " in said
    assert "training.gradient_checkpointing=true (about " in said
    status = next((haori_home / "runs").glob("*/run.json")).read_text()
    assert json.loads(status)["status"] == "failed"
    if kind == "full":
        return  # the advice is the same
    done = child(haori_home, tiny_base_folder, long_data, LIMIT, *settings, "training.micro_batch_tokens=2000")
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout


def test_a_base_that_does_not_fit_is_a_sentence(haori_home, tmp_path, long_data):
    from transformers import LlamaConfig, LlamaForCausalLM

    base = build_tiny_base(tmp_path / "base")
    config = LlamaConfig.from_pretrained(base)
    config.intermediate_size, config.hidden_size, config.dtype = 16384, 512, torch.bfloat16
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    failed = child(haori_home, base, long_data, 100_000_000, *SETTINGS)
    assert failed.returncode == 1, failed.stderr
    said = failed.stderr.strip().splitlines()[-1]
    assert said.startswith("BaseError: The base 'base' does not fit into the memory of 'cpu': its files hold 0.1"), said


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."), int(2.5 * 2**30)),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8192 bytes."), 8192),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] not enough memory: you tried to allocate 10 bytes."), 10),
        (RuntimeError("std::bad_alloc"), None),
        (OSError("Cannot allocate memory (os error 12)"), None),
        (MemoryError(), None),
    ],
)
def test_every_library_says_it_in_its_own_way(error: BaseException, asked: int | None):
    assert is_out_of_memory(error)
    assert requested_bytes(error) == asked


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("out of memory"), OSError("no such file")])
def test_other_failures_are_not_taken_for_it(error: BaseException):
    assert not is_out_of_memory(error)


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert requested_bytes(caught.value) == 4 << 50


def settings_named(prepared, usage: Usage, layers: int = 10) -> dict[str, int]:
    return {remedy.setting: remedy.saves for remedy in remedies(prepared, usage, layers, boundary=10_000_000)}


def test_remedies_are_those_that_the_run_does_not_use_yet(tiny_base_folder, long_data):
    usage = Usage(held=400_000_000, activations=1_000_000_000, trained=8_000_000, quantisable=150_000_000)

    def named(*overrides: str) -> dict[str, int]:
        document = {"name": "x", "base": str(tiny_base_folder), "data": {"path": str(long_data)}}
        return settings_named(prepare(recipe_from(document, ["training.micro_batch_tokens=2000", *overrides])), usage)

    assert named() == {
        "training.micro_batch_tokens=1000": 500_000_000,
        "training.gradient_checkpointing=true": 800_000_000,  # 1 GB x 9/10, less the inputs of 10 layers
        "method.kind=qlora": 150_000_000,
    }
    full = named("method={kind: full}")
    assert full["method.kind=qlora"] == 158_000_000  # gradients and moments of all weights go too
    checkpointed = named("training.gradient_checkpointing=true", "method={kind: qlora}")
    assert "training.gradient_checkpointing=true" not in checkpointed
    assert not any(setting.startswith("method.") for setting in checkpointed)
    assert "method.bits=4" in named("method={kind: qlora, bits: 8}")


def test_the_smallest_micro_batch_holds_the_longest_row(tiny_base_folder, long_data):
    document = {"name": "x", "base": str(tiny_base_folder), "data": {"path": str(long_data)}}
    prepared = prepare(recipe_from(document, []))
    longest = max(prepared.split.train["length"])
    tight = prepared._replace(
        recipe=prepared.recipe.model_copy(
            update={"training": prepared.recipe.training.model_copy(update={"micro_batch_tokens": longest})}
        )
    )
    found = settings_named(tight, Usage(10**8, 10**9, 10**6, 10**7))
    assert not any(setting.startswith("training.micro_batch_tokens") for setting in found)
    assert any(re.match(rf"data\.max_length={longest // 2} ", setting) for setting in found)


def test_memory_figures():
    before = current_memory_bytes()
    block = torch.ones(25_000_000)
    assert current_memory_bytes() - before == pytest.approx(block.numel() * 4, rel=0.1)
    assert peak_memory_bytes() >= current_memory_bytes()
    assert [size_in_words(n) for n in (1_240_000_000, 78_800_000, 2_000)] == ["1.24 GB", "78.8 MB", "2.0 kB"]
