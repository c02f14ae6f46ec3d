"""The loop on a tiny real Llama: exactness of accumulation, resume, restore, and its refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import save_file

from haori.core.errors import FileFormatError, TrainingError
from haori.tasks.causal_lm.objective import CausalLmObjective
from haori.training.checkpoint import checkpoints_of
from haori.training.loop import Loop
from haori.training.measurements import draw_losses
from haori.training.signals import StopRequest
from tests.training_samples import make_loop, recipe, rows


def adapter(loop: Loop) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in loop.model.named_parameters() if p.requires_grad}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_lowers_both_losses(tiny_base_folder: Path, tmp_path: Path):
    loop = make_loop(tiny_base_folder, tmp_path / "run", recipe("optimizer.lr=5e-2"), rows(40), rows(10, seed=1))
    loop.run(StopRequest())
    validation = [line["loss"] for line in loop.measurements.series("validation")]
    assert len(validation) == 4
    assert validation[-1] < validation[0] - 0.4
    steps = loop.measurements.series("train")
    trained = [line["loss"] for line in steps]
    assert sum(trained[-5:]) / 5 < sum(trained[:5]) / 5 - 0.4
    assert all(line["train_loss"] > line["loss"] - 1 for line in loop.measurements.series("validation")[1:])
    assert len(steps) == loop.total_steps == loop.position.step
    draw_losses(loop.measurements, tmp_path / "loss.png", loop.position.best_step, "t", "loss")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_one_step_equals_stock_peft_with_plain_torch(tiny_base_folder: Path, tmp_path: Path):
    """The oracle: full logits, one batch, torch's own mean over labelled tokens.

    Adam divides tiny gradients by their own size, which turns rounding into whole steps; a larger eps prevents that.
    """
    made = recipe(
        "training.batch_tokens=100000", "training.micro_batch_tokens=60", "training.max_steps=3", "optimizer.eps=1e-3"
    )
    data = rows(12)
    loop = make_loop(tiny_base_folder, tmp_path / "run", made, data, None)
    twin = make_loop(tiny_base_folder, tmp_path / "twin", made, data, None)
    loop.run(StopRequest())
    optimizer = torch.optim.AdamW(
        [p for p in twin.model.parameters() if p.requires_grad], lr=5e-3, eps=1e-3, weight_decay=0.0
    )
    batch = CausalLmObjective(data, 0).batch(range(12))
    for line in loop.measurements.series("train"):
        out = twin.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        assert line["loss"] == pytest.approx(float(out.loss.detach()), rel=1e-5)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in twin.model.parameters() if p.requires_grad], 1.0)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.step()
        optimizer.zero_grad()
    theirs = adapter(twin)
    for name, tensor in adapter(loop).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_a_run_stopped_and_resumed_ends_bit_equal(tiny_base_folder: Path, tmp_path: Path, stop_at: int, dropout: str):
    made = recipe("training.save_every=2", f"method.dropout={dropout}")
    train, validation = rows(40), rows(10, seed=1)
    whole = make_loop(tiny_base_folder, tmp_path / "whole", made, train, validation)
    whole.run(StopRequest())

    class StopAt(StopRequest):
        def __bool__(self) -> bool:
            return first.position.step >= stop_at

    first = make_loop(tiny_base_folder, tmp_path / "part", made, train, validation)
    first.run(StopAt())
    torch.manual_seed(123)
    newest = checkpoints_of(tmp_path / "part")[-1]
    done = int(newest.name.removeprefix("step-"))
    assert done == stop_at
    second = make_loop(tiny_base_folder, tmp_path / "part", made, train, validation, done)
    second.run(StopRequest(), second.restore(newest))
    assert_equal(adapter(whole), adapter(second))
    timeless = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in loop.measurements.lines]
        for loop in (whole, second)
    ]
    assert timeless[0] == timeless[1]
    on_disk = [json.loads(line) for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()]
    assert on_disk == second.measurements.lines


def fp16_loop(base: Path, folder: Path, train: Dataset, done: int = 0, scale: float = 2.0**23) -> Loop:
    """A loop with torch's own loss scaling; a CPU may use it, though Accelerate asks for a GPU to turn it on."""
    AcceleratorState._reset_state()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    accelerator.native_amp = True
    made = recipe("training.save_every=1", "training.max_steps=12", "optimizer.max_grad_norm=0.01")
    accelerator.state._mixed_precision = "fp16"
    return make_loop(base, folder, made, train, None, done, accelerator)


def test_loss_scale_in_fp16_goes_on_where_it_was(tiny_base_folder: Path, tmp_path: Path):
    train = rows(40)
    whole = fp16_loop(tiny_base_folder, tmp_path / "whole", train)
    whole.run(StopRequest())
    scales = whole.accelerator.scaler.state_dict()
    assert scales["scale"] < 2.0**23

    class StopAt(StopRequest):
        def __bool__(self) -> bool:
            return first.position.step >= 7

    first = fp16_loop(tiny_base_folder, tmp_path / "part", train)
    first.run(StopAt())
    second = fp16_loop(tiny_base_folder, tmp_path / "part", train, 7)
    newest = checkpoints_of(tmp_path / "part")[-1]
    position = second.restore(newest)
    assert second.accelerator.scaler.state_dict() == first.accelerator.scaler.state_dict()
    second.run(StopRequest(), position)
    assert second.accelerator.scaler.state_dict() == scales
    assert_equal(adapter(whole), adapter(second))
    newest = checkpoints_of(tmp_path / "part")[-1]
    (newest / "scaler.json").unlink()
    with pytest.raises(FileFormatError, match=r"scaler\.json"):
        fp16_loop(tiny_base_folder, tmp_path / "part", train, 7).restore(newest)


def test_steps_that_all_overflowed_leave_a_checkpoint_that_can_be_resumed(tiny_base_folder: Path, tmp_path: Path):
    """None of them reached the optimizer, so it has no moments yet."""
    train = rows(40)
    loop = fp16_loop(tiny_base_folder, tmp_path / "run", train, scale=2.0**100)
    loop.run(StopRequest())
    again = fp16_loop(tiny_base_folder, tmp_path / "run", train, 12, scale=2.0**100)
    assert again.restore(checkpoints_of(tmp_path / "run")[-1]).step == 12
    assert again.accelerator.scaler.state_dict()["scale"] == 2.0**88
    assert_equal(adapter(loop), adapter(again))


def test_a_checkpoint_of_version_0_1_restores_the_random_state(tiny_base_folder: Path, tmp_path: Path):
    loop = make_loop(tiny_base_folder, tmp_path / "run", recipe("training.max_steps=2"), rows(40), None)
    loop.run(StopRequest())
    newest = checkpoints_of(tmp_path / "run")[-1]
    torch.manual_seed(77)
    save_file({"cpu": torch.get_rng_state()}, newest / "random.safetensors")
    expected = torch.rand(3)
    loop.restore(newest)
    assert torch.equal(torch.rand(3), expected)


def test_over_fitting_stops_early_and_restores_the_best(tiny_base_folder: Path, tmp_path: Path):
    made = recipe("training.epochs=30", "optimizer.lr=2e-2", "training.patience=2", "training.keep_checkpoints=1")
    random = rows(10, seed=2)
    unlearnable = Dataset.from_dict(
        {**random.to_dict(), "labels": [[-100] * 3 + ids[3:] for ids in random["input_ids"]]}
    )
    train = Dataset.from_dict({**rows(10).to_dict(), "labels": [[-100] * 3 + ids[3:] for ids in rows(10)["input_ids"]]})
    loop = make_loop(tiny_base_folder, tmp_path / "run", made, train, unlearnable)
    ended = loop.run(StopRequest())
    assert loop.stopped_early
    losses = [line["loss"] for line in loop.measurements.series("validation")][1:]
    assert ended.best_loss == min(losses)
    assert losses[-1] > ended.best_loss
    assert len(losses) < 30
    assert loop._mean_losses(loop.validation).values["loss"] == pytest.approx(ended.best_loss, rel=1e-6)
    assert {p.name for p in checkpoints_of(tmp_path / "run")} == {
        f"step-{ended.best_step:08d}", f"step-{ended.step:08d}"
    }  # fmt: skip


def test_loss_that_is_not_finite_names_the_rows(tiny_base_folder: Path, tmp_path: Path):
    data = rows(6)
    loop = make_loop(tiny_base_folder, tmp_path / "run", recipe("training.batch_tokens=100000"), data, None)
    embedding = loop.model.get_input_embeddings()
    poisoned = data[3]["input_ids"][0]
    bad = [i for i in range(6) if poisoned in data[i]["input_ids"]]
    with torch.no_grad():
        embedding.weight[poisoned] = float("nan")
        loop.model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn_like(embedding.weight))
    with pytest.raises(TrainingError) as caught:
        loop.run(StopRequest())
    assert "loss became nan" in str(caught.value)
    assert any(f"data.jsonl:{i + 1}" in str(caught.value) for i in bad)
    assert checkpoints_of(tmp_path / "run") == []


def test_max_steps_ends_in_the_middle_of_an_epoch_with_a_checkpoint(tiny_base_folder: Path, tmp_path: Path):
    loop = make_loop(tiny_base_folder, tmp_path / "run", recipe("training.max_steps=2"), rows(40), rows(5, seed=1))
    ended = loop.run(StopRequest())
    assert ended.step == 2
    assert math.isfinite(ended.best_loss or math.nan)
    assert checkpoints_of(tmp_path / "run")[-1].name == "step-00000002"
