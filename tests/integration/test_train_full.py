"""Full fine-tuning through the command line: trained, proved, kept as a model folder, resumed to the same bytes."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import haori
from haori.core.errors import InputError, TrainingError
from haori.core.records import RunRecord, Verification
from haori.training import prepare, resume_run, train_run
from tests.command_line import haori as haori_command
from tests.conftest import build_tiny_base


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"what is number {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SETTINGS = ["--set", "method.kind=full", "--set", "training.epochs=2", "--set", "optimizer.lr=2e-3"]


def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.arange(5, 30)[None]).logits


@pytest.mark.parametrize(("asked", "stored"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_a_model_is_trained_proved_and_a_base_like_any_other(
    capsys, haori_home, tiny_base_folder, data, tmp_path, asked, stored
):
    out = tmp_path / "out"
    done = haori_command(
        capsys, "train", "--base", tiny_base_folder, "--data", data, "--name", "whole", "--out", out, *SETTINGS,
        "--set", f"training.dtype={asked}", "--set", "data.licence=CC-BY-4.0",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "The model whole is trained and proved: 5 checks passed" in done.out
    run = next((haori_home / "runs").iterdir())
    record = RunRecord.model_validate_json((run / "run.json").read_bytes())
    assert record.model == str(run / "model")
    assert (record.status, record.adapter) == ("finished", None)
    assert record.validation_loss < record.initial_validation_loss - 0.1
    base = haori.bases.find_base(str(tiny_base_folder))
    assert record.trainable_parameters == record.total_parameters == base.parameters
    proof = Verification.model_validate_json((run / "verification.json").read_bytes())
    checks = {check.name: check for check in proof.checks}
    assert checks["reload"].value == 0.0
    assert "skipped" not in checks["prompt"].detail
    made = haori.bases.find_base(str(run / "model"))
    assert made.fingerprint.compare(base.fingerprint) == "other weights"
    assert "CC-BY-4.0" in made.licence
    assert f"haori bases add {run / 'model'}" in done.out
    files = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {stored}
    assert "lm_head.weight" not in weights  # tied to the embedding: stored once
    assert not torch.equal(logits(out, stored), logits(tiny_base_folder, stored))
    assert (
        AutoTokenizer.from_pretrained(out).chat_template
        == AutoTokenizer.from_pretrained(tiny_base_folder).chat_template
    )
    assert not haori.Library().list()
    with pytest.raises(InputError, match="its model is"):
        resume_run(run)


def test_the_live_model_is_what_is_on_disk_and_the_best_of_the_run(tiny_base_folder, data):
    """The model folder holds the weights of the best checkpoint, bit for bit."""
    run = train_run(haori.api.recipe_of(None, str(tiny_base_folder), str(data), "best", SETTINGS[1::2]))
    assert run.adapter is None
    assert run.verification is not None
    assert run.verification.passed
    best = load_file(run.folder / "checkpoints" / f"step-{run.record.best_step:08d}" / "model.safetensors")
    saved = load_file(run.folder / "model" / "model.safetensors")
    assert best.keys() == saved.keys()
    assert all(torch.equal(best[name], saved[name]) for name in best)


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_a_stopped_run_resumes_to_the_same_bytes(tiny_base_folder, data, dtype):
    settings = [*SETTINGS[1::2], "training.save_every=1", "training.max_steps=5", f"training.dtype={dtype}"]
    recipe = haori.api.recipe_of(None, str(tiny_base_folder), str(data), "x", settings)
    whole = train_run(recipe)

    def stop_at_three(event):
        if event.kind == "progress" and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    part = train_run(recipe, on_event=stop_at_three)
    assert part.signal == signal.SIGINT
    assert part.record.model is None
    assert not (part.folder / "model").exists()
    rest = resume_run(part.folder)
    assert rest.record.steps == whole.record.steps > 3
    for name in ("model/model.safetensors", f"checkpoints/step-{whole.record.steps:08d}/optimizer.safetensors"):
        assert (rest.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_moments_are_kept_in_the_format_of_the_weights(tiny_base_folder, data):
    recipe = haori.api.recipe_of(None, str(tiny_base_folder), str(data), "x", [*SETTINGS[1::2], "training.max_steps=1"])
    run = train_run(recipe)
    moments = load_file(run.folder / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}


def test_the_plan_counts_every_weight_once(capsys, haori_home, tiny_base_folder, data):
    done = haori_command(
        capsys, "train", "--base", tiny_base_folder, "--data", data, "--name", "x", "--dry-run", *SETTINGS
    )
    assert done.code == 0, done.err
    parameters = f"{haori.bases.find_base(str(tiny_base_folder)).parameters:,}"
    assert f"{parameters} of {parameters} (100.00%)" in " ".join(done.out.split())
    assert not (haori_home / "runs").exists()


@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data, kind):
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    from safetensors.torch import save_file

    base = build_tiny_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    settings = [f"method.kind={kind}", "training.epochs=1", "data.validation_share=0"]
    prepared = prepare(haori.api.recipe_of(None, str(base), str(data), "x", settings))
    with pytest.raises(TrainingError, match=r"loss became nan at step 1 in .*data\.jsonl:\d+"):
        train_run(prepared.recipe, prepared=prepared)
    (run,) = haori.core.settings.settings().runs.iterdir()
    assert RunRecord.model_validate_json((run / "run.json").read_bytes()).status == "failed"
    assert not (run / "model").exists()


def test_a_model_that_fails_its_proof_is_not_kept_as_a_result(haori_home, tiny_base_folder, data):
    """With a rate this small every step of a bf16 weight is lost to rounding: nothing was trained."""
    from haori.core.errors import VerificationError

    settings = ["method.kind=full", "training.max_steps=2", "training.dtype=bf16", "optimizer.lr=1e-50"]
    with pytest.raises(VerificationError, match=r"The model failed its proof .effect: .*exactly what the base does"):
        train_run(haori.api.recipe_of(None, str(tiny_base_folder), str(data), "x", settings))
    run = next((haori_home / "runs").iterdir())
    record = RunRecord.model_validate_json((run / "run.json").read_bytes())
    assert (record.status, record.model) == ("failed", None)
