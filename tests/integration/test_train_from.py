"""Training that goes on from a stored adapter."""

import json
from pathlib import Path

import pytest
import torch

import haori
from haori.core.errors import MismatchError, RecipeError, VerificationError
from haori.library import Library
from haori.tasks.recipe import load_recipe

SETTINGS = [
    "training.epochs=2", "method.rank=4", "method.target=[q_proj,down_proj]", "optimizer.lr=5e-3",
    "training.dtype=fp32", "data.validation_share=0.2",
]  # fmt: skip


def rows(path: Path, words: tuple[str, str]) -> Path:
    made = [{"prompt": f"what is number {i}?", "completion": f"it is {words[i % 2]}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture
def first(tiny_base_folder: Path, haori_home: Path, tmp_path: Path) -> haori.TrainedRun:
    data = rows(tmp_path / "first.jsonl", ("even", "odd"))
    return haori.train(
        base=str(tiny_base_folder), data=str(data), name="first", overrides=[*SETTINGS, "data.licence=MIT"],
        progress=False,
    )  # fmt: skip


def go_on(base: Path, data: Path, name: str, origin: str, *overrides: str) -> haori.TrainedRun:
    given = ["training.epochs=1", "training.dtype=fp32", f"from={json.dumps(origin)}", *overrides]
    return haori.train(base=str(base), data=str(data), name=name, overrides=given, progress=False)


def stock_loss(base: Path, adapter: Path, run: Path) -> float:
    """The mean loss of stock PEFT on the run's validation rows."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from haori.training import prepare

    prepared = prepare(load_recipe(run / "recipe.yaml"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in prepared.split.validation:
            labels = torch.tensor([row["labels"]])
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
            kept = labels[0, 1:] != -100
            total += float(
                torch.nn.functional.cross_entropy(logits[0, :-1][kept], labels[0, 1:][kept], reduction="sum")
            )
            count += int(kept.sum())
    return total / count


def test_it_begins_where_the_other_ended_and_says_so(first: haori.TrainedRun, tiny_base_folder: Path, tmp_path: Path):
    assert first.adapter is not None
    run = go_on(
        tiny_base_folder, rows(tmp_path / "more.jsonl", ("two", "three")), "second", "first", "method.dropout=0.1"
    )
    assert run.adapter is not None
    card = run.adapter.card
    assert card.parents == (first.adapter.card.id,)
    assert card.rank == 4
    assert card.id != first.adapter.card.id
    kept = load_recipe(run.folder / "recipe.yaml")
    assert kept.from_ == "first@1"
    assert kept.method.rank == 4 and kept.method.dropout == 0.1
    started = next(json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines())
    assert started["kind"] == "validation" and started["step"] == 0
    assert started["loss"] == pytest.approx(stock_loss(tiny_base_folder, first.adapter.path, run.folder), rel=1e-5)
    names = {check.name for check in card.verification.checks}
    assert "learnt" in names
    again = haori.train(load_recipe(run.folder / "recipe.yaml"), progress=False)
    assert again.adapter.card.id == card.id  # the resolved recipe repeats the run


def test_a_stock_folder_can_be_gone_on_from(first: haori.TrainedRun, tiny_base_folder: Path, tmp_path: Path):
    (tmp_path / "stock").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "stock" / name).write_bytes((first.adapter.path / name).read_bytes())
    run = go_on(tiny_base_folder, rows(tmp_path / "more.jsonl", ("a", "b")), "second", str(tmp_path / "stock"))
    assert run.adapter.card.parents == (first.adapter.card.id,)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.rank=8"], r"'method.rank' is 8, and the adapter 'first@1' to go on from has 4"),
        (["method.target=[q_proj,v_proj]"], r"'method.target'"),
        (["method.rslora=true"], r"'method.rslora' is True"),
        (["method.modules_to_save=[lm_head]"], r"'method.modules_to_save'"),
        (["method.kind=dora"], r"is lora; set method.kind=lora or qlora"),
        (["method.kind=full"], r"goes on from LoRA and DoRA adapters.*says full"),
        (["method.kind=adalora"], r"says adalora"),
    ],
)
def test_another_shape_is_refused_by_name(
    first: haori.TrainedRun, tiny_base_folder: Path, tmp_path: Path, overrides: list[str], said: str
):
    data = rows(tmp_path / "more.jsonl", ("a", "b"))
    with pytest.raises(RecipeError, match=said):
        go_on(tiny_base_folder, data, "second", "first", *overrides)
    assert [stored.name for stored in Library().list()] == ["first@1"]


def test_what_is_no_adapter_or_of_another_base_is_refused(
    first: haori.TrainedRun, tiny_base_folder: Path, tmp_path: Path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = rows(tmp_path / "more.jsonl", ("a", "b"))
    with pytest.raises(RecipeError, match=r"'from' cannot be 'nobody'"):
        go_on(tiny_base_folder, data, "second", "nobody")
    with pytest.raises(RecipeError, match=r"'from' cannot be 'nobody'"):  # said before data are looked at
        go_on(tiny_base_folder, tmp_path / "no-such-data.jsonl", "second", "nobody")
    with pytest.raises(RecipeError, match=r"no folder with an adapter_config.json"):
        go_on(tiny_base_folder, data, "second", str(tmp_path / "nowhere"))
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_base_folder).save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="other weights"):
        go_on(tmp_path / "other", data, "second", "first")


def test_a_run_that_taught_nothing_new_fails_its_proof(
    first: haori.TrainedRun, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(VerificationError, match=r"learnt: .*are 0 away from those of first@1"):
        go_on(tiny_base_folder, rows(tmp_path / "more.jsonl", ("a", "b")), "second", "first")
