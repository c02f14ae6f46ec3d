"""What a method is told against what a base can do, found on a skeleton; groups, starts and ends of methods."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from haori.adapters.insertion import Insertion, in_layers, refuse_dead
from haori.adapters.methods import behaviour_of, check_method, check_plan, insert_method
from haori.bases import find_base, load_skeleton, resolve_targets
from haori.core.errors import InputError
from haori.core.methods import Method
from haori.tasks.recipe import recipe_from
from haori.training.checkpoint import checkpoints_of
from haori.training.signals import StopRequest
from tests.training_samples import make_loop, recipe, rows


def method(*overrides: str) -> Method:
    return recipe_from({"name": "t", "base": "b", "data": {"path": "p"}}, overrides).method


def check(base: Path, tokenizer: Any, made: Method, *, target: Any = None) -> None:
    skeleton = load_skeleton(find_base(str(base)))
    check_method(skeleton, tokenizer, made, resolve_targets(skeleton, target or made.target))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rank_pattern.q_porj=4"], "The key 'q_porj' of method.rank_pattern fits none of the 14 target modules"),
        (["alpha_pattern.(=4"], "'(' of method.alpha_pattern is not a valid regular expression"),
        (["bias=adapted"], "no biases in the adapted modules"),
        (["bias=all"], "no biases to train"),
        (["modules_to_save=[lm_haed]"], "'lm_head'"),
        (["init=pissa", "target=[embed_tokens]"], "'pissa' is not defined for 'model.embed_tokens', a Embedding"),
        (["kind=adalora", "target=[embed_tokens]"], "AdaLoRA is not defined for 'model.embed_tokens'"),
        (["kind=adalora", "trainable_tokens=[Is]"], "AdaLoRA does not train single tokens"),
        (["kind=peft", "type=LOAH"], "PEFT has no method 'LOAH'; did you mean 'LOHA'"),
        (["kind=peft", "type=dance"], "PEFT has no method 'dance'"),
        (["kind=peft", "type=lora"], "use method.kind=lora"),
        (["kind=peft", "type=poly"], "it needs a task id with every row"),
        (["kind=peft", "type=prompt_tuning"], "lengthens every row"),
        (["kind=peft", "type=prefix_tuning"], "method.options.num_virtual_tokens=20"),
        (["kind=peft", "type=loha", "options.rr=4"], "LOHA of PEFT has no option 'rr'; did you mean 'r'"),
        (["kind=peft", "type=loha", "options.target_modules=[x]"], "which is set by method.target"),
        (["kind=peft", "type=loha", "options.r=-1"], "PEFT does not build LOHA"),
        (["kind=peft", "type=vblora"], "must be divisible by `vector_length` 256"),
        (["kind=peft", "type=trainable_tokens"], "name some there"),
        (["kind=peft", "type=loha", "trainable_tokens=[Is]"], "cannot be told method.trainable_tokens"),
        (
            ["kind=peft", "type=prefix_tuning", "options.num_virtual_tokens=4", "layers=[1]"],
            "cannot be told method.target or layers",
        ),
    ],
)
def test_what_does_not_go_with_the_base_is_a_sentence(tiny_base_folder, tiny_tokenizer, overrides, said):
    with pytest.raises(InputError) as caught:
        check(tiny_base_folder, tiny_tokenizer, method(*[f"method.{override}" for override in overrides]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_goes_with_the_base_is_not_refused(tiny_base_folder, tiny_tokenizer):
    for kind in ("lora", "dora", "adalora"):
        check(tiny_base_folder, tiny_tokenizer, method(f"method.kind={kind}", "method.train_norms=true"))
    for kind in ("ia3", "Loha", "VERA", "ln_tuning"):
        check(tiny_base_folder, tiny_tokenizer, method("method.kind=peft", f"method.type={kind}"))


@pytest.mark.parametrize(
    ("overrides", "steps", "said"),
    [
        (["kind=adalora", "rank=4", "initial_rank=4"], 100, "method.initial_rank (4) must be larger than method.rank"),
        (["kind=adalora", "rank=4", "initial_rank=6"], 1, "1 optimizer steps are too few"),
        (["kind=adalora", "rank=4", "initial_rank=6", "warmup=0.6", "settle=0.4"], 50, "(30 of warm-up, 20 to settle)"),
        (["init=orthogonal", "rank=3"], 10, "needs even ranks; 3 is odd"),
        (["init=pissa", "rank=40"], 10, "k_proj' has only 32 of them; method.rank cannot be 40"),
        (["init=eva", "rank=8", "rank_pattern.q_proj=64"], 10, "method.rank cannot be 64"),
    ],
)
def test_a_plan_that_cannot_be_is_a_sentence(tiny_base_folder, overrides, steps, said):
    skeleton = load_skeleton(find_base(str(tiny_base_folder)))
    made = method(*[f"method.{override}" for override in overrides])
    with pytest.raises(InputError) as caught:
        check_plan(skeleton, made, resolve_targets(skeleton, "all-linear"), steps)
    assert said in str(caught.value)


def test_layers_are_chosen_by_number():
    names = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 11)]
    assert in_layers(names, ()) == tuple(names)
    assert in_layers(names, (1, 11)) == tuple(names[1:])
    with pytest.raises(InputError, match="names the layer 2, which holds no target; targets are in the layers 0 to 11"):
        in_layers(names, (0, 2))


def adapted(base: Path, tokenizer: Any, *overrides: str) -> tuple[Any, Method]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = method("method.rank=4", "method.alpha=8", *[f"method.{override}" for override in overrides])
    targets = in_layers(resolve_targets(model, made.target), made.layers)
    return insert_method(model, tokenizer, made, targets, Insertion(0, 10)), made


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_norms_are_trained_one_by_one(tiny_base_folder, tiny_tokenizer):
    model, _ = adapted(tiny_base_folder, tiny_tokenizer, "train_norms=true")
    norms = {name for name in trained_names(model) if "norm" in name}
    assert len(norms) == 5  # two in each of two layers, and the last one
    model, _ = adapted(tiny_base_folder, tiny_tokenizer, "train_norms=true", "layers=[1]")
    names = trained_names(model)
    assert len([name for name in names if "norm" in name]) == 2
    assert all(".layers.1." in name for name in names)


def test_lora_plus_gives_b_another_rate(tiny_base_folder, tiny_tokenizer):
    model, made = adapted(tiny_base_folder, tiny_tokenizer, "lr_ratio=16", "target=[embed_tokens, q_proj]")
    groups = behaviour_of(model, made, 10).parameter_groups(0.1)
    assert [(group["rate"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (1.0, 0.1, 3), (16.0, 0.1, 3),
    ]  # fmt: skip
    outer = {id(parameter) for parameter in groups[1]["params"]}
    named = {name for name, parameter in model.named_parameters() if id(parameter) in outer}
    assert all("lora_B" in name or "lora_embedding_B" in name for name in named)


@pytest.mark.parametrize("part", ["q_proj", "embed_tokens"])
def test_a_start_with_both_factors_zero_is_refused(tiny_base_folder, tiny_tokenizer, part):
    model, _ = adapted(tiny_base_folder, tiny_tokenizer, "target=[embed_tokens, q_proj]")
    refuse_dead(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name and part in name:
                parameter.zero_()
    with pytest.raises(InputError, match=rf"{part}' both A and B begin at zero"):
        refuse_dead(model)


STATEFUL = {
    "adalora": ("method.kind=adalora", "method.initial_rank=6"),
    "dora, LoRA+": ("method.kind=dora", "method.lr_ratio=4"),
    "pissa": ("method.init=pissa",),
}


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("stop_at", [3, 12])
def test_a_method_resumes_to_the_same_adapter(tiny_base_folder: Path, tmp_path: Path, name: str, stop_at: int):
    made = recipe("training.epochs=4", "training.save_every=3", *STATEFUL[name])
    train, validation = rows(30), rows(8, seed=1)
    whole = make_loop(tiny_base_folder, tmp_path / "whole", made, train, validation)
    assert whole.total_steps > 12
    ended = whole.run(StopRequest())

    class StopAt(StopRequest):
        def __bool__(self) -> bool:
            return first.position.step >= stop_at

    first = make_loop(tiny_base_folder, tmp_path / "part", made, train, validation)
    first.run(StopAt())
    second = make_loop(tiny_base_folder, tmp_path / "part", made, train, validation, stop_at)
    again = second.run(StopRequest(), second.restore(checkpoints_of(tmp_path / "part")[-1]))
    assert again.step == ended.step
    assert second.behaviour.ranks() == whole.behaviour.ranks()
    ours = dict(second.model.named_parameters())
    for key, tensor in whole.model.named_parameters():
        assert torch.equal(tensor, ours[key]), key


def test_adalora_trains_nothing_that_is_not_saved(tiny_base_folder, tiny_tokenizer):
    """PEFT's ranknum becomes trainable when it is moved to a base in 16 bits."""
    from peft import get_peft_model_state_dict

    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.bfloat16)
    made = method("method.kind=adalora", "method.rank=2", "method.initial_rank=3", "method.alpha=6")
    model = insert_method(model, tiny_tokenizer, made, resolve_targets(model, "all-linear"), Insertion(0, 10))
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {name.replace(".default", "") for name in trained_names(model)} == set(saved)


def test_adalora_ends_with_the_ranks_it_was_asked_for_and_the_best_of_them(tiny_base_folder: Path, tmp_path: Path):
    """Validations before the ranks are final are no candidates, and the best one comes back with its ranks."""
    made = recipe("training.epochs=8", "optimizer.lr=5e-2", "training.patience=100", *STATEFUL["adalora"])
    loop = make_loop(tiny_base_folder, tmp_path / "run", made, rows(30), rows(8, seed=1))
    ended = loop.run(StopRequest())
    assert ended.best_step is not None
    assert loop.behaviour.settled(ended.best_step)
    settled = [line for line in loop.measurements.series("validation") if loop.behaviour.settled(line["step"])]
    assert ended.best_loss == min(line["loss"] for line in settled)
    assert loop._mean_losses(loop.validation).values["loss"] == pytest.approx(ended.best_loss, rel=1e-5)
    ranks = loop.behaviour.ranks()
    assert set(ranks) == {f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")}
    assert sum(ranks.values()) == 4 * len(ranks)
    assert all("penalty" in line for line in loop.measurements.series("train"))
    shapes = {name: len(p) for name, p in loop.model.named_parameters() if ".lora_A." in name}
    assert sorted(shapes.values()) == sorted(ranks.values())
