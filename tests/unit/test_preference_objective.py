"""What the objective computes on a tiny real Llama, against full logits in float64; and its reference."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from haori.adapters.fused import fuse
from haori.adapters.insertion import Insertion
from haori.adapters.methods import insert_method
from haori.tasks.preference.objective import PreferenceObjective, answer_scores, pad
from haori.tasks.preference.recipe import DpoLoss, HingeLoss, IpoLoss, KtoLoss, OrpoLoss, PreferenceLoss, SimpoLoss
from haori.tasks.preference.reference import Reference
from haori.tasks.recipe import recipe_from

TARGETS = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")]
LOSSES: dict[str, PreferenceLoss] = {
    "dpo": DpoLoss(kind="dpo", beta=0.5, label_smoothing=0.1), "ipo": IpoLoss(kind="ipo", beta=0.4),
    "hinge": HingeLoss(kind="hinge", beta=0.5), "orpo": OrpoLoss(kind="orpo", beta=0.3),
    "simpo": SimpoLoss(kind="simpo", beta=2.0, gamma=0.7), "kto": KtoLoss(kind="kto", beta=0.5, desirable_weight=1.5),
}  # fmt: skip
REFERENCE = Reference(("test",), adapters_off=False, budget=120)


def pairs(n: int, seed: int = 0, *, judged: bool = False) -> Dataset:
    """Random prompts with two answers each, or one that is judged."""
    random = np.random.default_rng(seed)
    made: list[dict] = []
    for i in range(n):
        prompt = random.integers(5, 200, random.integers(3, 9)).tolist()
        answers = [[*random.integers(5, 200, random.integers(1, 9)).tolist(), 2] for _ in range(2)]
        ids = [[*prompt, *answer] for answer in answers]
        labels = [[*[-100] * len(prompt), *answer] for answer in answers]
        made.append(
            {
                "input_ids": ids[0], "labels": labels[0], "prompt_length": len(prompt), "prompt": random.random(),
                "rejected_input_ids": None if judged else ids[1], "rejected_labels": None if judged else labels[1],
                "desirable": i % 3 != 0 if judged else None, "origin": f"data.jsonl:{i + 1}",
                "longest": len(ids[0]) if judged else max(map(len, ids)),
            }
        )  # fmt: skip
    return Dataset.from_list(made)


def objective(kind: str, n: int = 6, seed: int = 0, reference: Reference | None = REFERENCE) -> PreferenceObjective:
    known = reference if getattr(LOSSES[kind], "reference", None) else None
    return PreferenceObjective(pairs(n, seed, judged=kind == "kto"), 0, LOSSES[kind], 64, known)


def model_of(base: Path, *, trained: bool = True, dtype: torch.dtype = torch.float32, method: str = "lora"):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    section = recipe_from(
        {"name": "t", "base": "b", "data": {"path": "p"}, "method": {"kind": method, "rank": 4, "alpha": 8}}
    ).method
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    adapted = insert_method(model, AutoTokenizer.from_pretrained(base), section, TARGETS, Insertion(0, 10, (), None))
    if trained:
        shake(adapted)
    return adapted.eval()


def shake(model, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def exact(model, ids: list[int], labels: list[int]) -> tuple[torch.Tensor, int]:
    """Return log p(answer) of one sequence alone, from all logits in float64, and the answer's tokens."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    found = [torch.log_softmax(logits[place], -1)[label] for place, label in enumerate(labels[1:]) if label != -100]
    return torch.stack(found).sum(), len(found)


def expected(kind: str, made: PreferenceObjective, model, rows: range) -> torch.Tensor:
    """Return the losses of rows as the papers write them, from one sequence at a time."""
    sequences = made.sequences(list(rows))
    policy, tokens = zip(*(exact(model, *sequence) for sequence in sequences), strict=True)
    with torch.no_grad(), model.disable_adapter():
        reference = [exact(model, *sequence)[0] for sequence in sequences]
    section, half = LOSSES[kind], len(rows)
    losses = []
    if kind == "kto":
        z = max(0.0, sum((p - r).item() for p, r in zip(policy[half:], reference[half:], strict=True)) / half)
    for i in rows:
        (w, lo), (rw, rl), (nw, nl) = ((x[i], x[half + i]) for x in (policy, reference, tokens))
        b = section.beta
        if kind == "dpo":
            p = torch.sigmoid(b * ((w - rw) - (lo - rl)))
            losses.append(-0.9 * torch.log(p) - 0.1 * torch.log(1 - p))
        elif kind == "ipo":
            losses.append(((w - rw) / nw - (lo - rl) / nl - 1 / (2 * b)) ** 2)
        elif kind == "hinge":
            losses.append(torch.clamp(1 - b * ((w - rw) - (lo - rl)), min=0))
        elif kind == "orpo":
            p, q = torch.exp(w / nw), torch.exp(lo / nl)
            losses.append(-w / nw - b * torch.log(torch.sigmoid(torch.log(p / (1 - p) * (1 - q) / q))))
        elif kind == "simpo":
            losses.append(-torch.log(torch.sigmoid(b * w / nw - b * lo / nl - 0.7)))
        elif made.data[i]["desirable"]:
            losses.append(1.5 * (1 - torch.sigmoid(b * ((w - rw) - z))))
        else:
            losses.append(1 - torch.sigmoid(b * (z - (w - rw))))
    return torch.stack(losses)


@pytest.mark.parametrize("path", ["stock", "fused"])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients_are_the_papers(tiny_base_folder, kind, path):
    model = model_of(tiny_base_folder, trained=False)
    made = objective(kind)
    fused = fuse(model) if path == "fused" else None
    made.begin(model)
    shake(model)
    found = made.loss(model, made.batch(range(6)))
    found.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    if fused is not None:
        fused.remove()
    wanted = expected(kind, made, model, range(6))
    wanted.sum().backward()
    torch.testing.assert_close(found.each.double(), wanted.detach(), rtol=2e-5, atol=2e-5)
    assert found.count == 6 and found.row_of.tolist() == list(range(6))
    assert found.total.item() == pytest.approx(wanted.sum().item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
            assert gradients[name].abs().max() > 1e-4 or "lora_A" in name


def test_padding_and_neighbours_change_nothing(tiny_base_folder):
    model = model_of(tiny_base_folder)
    made = objective("dpo", n=8)
    whole = made.loss(model, made.batch(range(8))).each
    alone = torch.cat([made.loss(model, made.batch([row])).each for row in range(8)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "kto"])
def test_parts_of_a_batch_add_up(tiny_base_folder, kind):
    model = model_of(tiny_base_folder)
    made = objective(kind)
    made.begin(model_of(tiny_base_folder, trained=False))
    batch = made.batch([5, 0, 3])
    whole = made.loss(model, batch)
    parts = [made.loss(model, made.part(batch, places)) for places in ([0, 2], [1])]
    assert made.separable and parts[1].count == 1 and made.part(batch, [1]).rows == (0,)
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    for name, value in whole.also.items():
        torch.testing.assert_close(sum(part.also[name] for part in parts), value)


def test_kto_is_not_taken_apart():
    assert not objective("kto").separable


def test_a_blank_batch_counts_nothing_and_keeps_the_graph(tiny_base_folder):
    model = model_of(tiny_base_folder)
    for kind in ("dpo", "kto"):
        made = objective(kind)
        found = made.loss(model, made.blank(made.batch([0, 1])))
        assert found.total.item() == 0 and found.count == 0 and not len(found.each)
        found.total.backward()
        assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)
        assert made.size(made.blank(made.batch([0, 1]))).count == 0


def test_figures_of_a_batch(tiny_base_folder):
    model = model_of(tiny_base_folder)
    made = objective("dpo")
    batch = made.batch(range(6))
    with torch.no_grad():
        scores, _ = answer_scores(model, batch.sequences)
    rewards = 0.5 * scores  # there is no reference yet: it counts as zero
    also = made.loss(model, batch).also
    assert float(also["accuracy"]) == int((rewards[:6] > rewards[6:]).sum())
    assert float(also["margin"]) == pytest.approx(float((rewards[:6] - rewards[6:]).sum()), rel=1e-5)
    assert float(also["chosen_reward"]) == pytest.approx(float(rewards[:6].sum()), rel=1e-5)
    size = made.size(batch)
    assert size.count == 6
    assert size.cost == sum(len(ids) for ids, _ in made.sequences(range(6)))
    assert made.costs == [2 * max(len(r["input_ids"]), len(r["rejected_input_ids"])) for r in made.data]


def test_figures_of_judged_answers_are_means_over_their_kinds(tiny_base_folder):
    model = model_of(tiny_base_folder)
    made = objective("kto", n=7)
    made.begin(model_of(tiny_base_folder, trained=False))
    batch = made.batch(range(7))
    with torch.no_grad():
        scores, _ = answer_scores(model, batch.sequences)
        also = made.loss(model, batch).also
    rewards = 0.5 * (scores - batch.reference)[:7]
    good = batch.desirable
    assert float(also["chosen_reward"]) / 7 == pytest.approx(float(rewards[good].mean()), rel=1e-4)
    assert float(also["rejected_reward"]) / 7 == pytest.approx(float(rewards[~good].mean()), rel=1e-4)


def test_mismatched_answers_are_those_of_other_prompts():
    made = objective("kto", n=5)
    data = made.data.map(lambda row, i: {"prompt": float(i // 2)}, with_indices=True)  # two answers to each prompt
    made = PreferenceObjective(data, 0, LOSSES["kto"], 64, None)
    assert made.partners == [2, 2, 4, 4, 0]
    first, second = made.sequences([1])
    length, other = data[1]["prompt_length"], data[2]
    assert second[0] == [*first[0][:length], *other["input_ids"][other["prompt_length"] :]]
    assert second[1][length:] == other["labels"][other["prompt_length"] :] and set(second[1][:length]) == {-100}
    sequences = made.sequences(range(5))
    assert made.costs == [2 * max(len(sequences[i][0]), len(sequences[5 + i][0])) for i in range(5)]
    short = PreferenceObjective(data, 0, LOSSES["kto"], length + 1, None)
    assert len(short.sequences([1])[1][0]) == length + 1


def test_before_the_first_step_nothing_tells_the_answers_apart(tiny_base_folder):
    for path in (fuse, lambda _: None):
        model = model_of(tiny_base_folder, trained=False)
        path(model)
        made = objective("dpo")
        made.begin(model)
        found = made.loss(model, made.batch([4, 2]))
        torch.testing.assert_close(found.each, torch.full((2,), math.log(2)), atol=1e-5, rtol=0)


def test_reference_of_a_fresh_adapter_is_the_base_and_is_kept(tiny_base_folder, haori_home):
    model = model_of(tiny_base_folder, trained=False)
    fused = fuse(model)
    made = objective("dpo")
    model.train()
    made.begin(model)
    assert model.training
    fused.remove()
    with torch.no_grad(), model.eval().disable_adapter():
        wanted = torch.tensor([float(exact(model, *sequence)[0]) for sequence in made.sequences(range(6))])
    torch.testing.assert_close(made.batch(range(6)).reference, wanted, rtol=1e-5, atol=1e-4)
    (kept,) = (haori_home / "cache" / "reference").iterdir()
    shake(model)  # a trained model gives other values, but those that were kept are taken
    again = objective("dpo")
    again.begin(model)
    assert torch.equal(again.batch(range(6)).reference, made.batch(range(6)).reference)
    np.save(kept / "scores.npy", np.zeros((3, 2), np.float32))  # not what belongs there
    again.begin(model)
    assert not torch.equal(again.batch(range(6)).reference, made.batch(range(6)).reference)
    objective("dpo", seed=9).begin(model)  # other tokens
    assert len(list((haori_home / "cache" / "reference").iterdir())) == 2


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_are_switched_off_on_every_path(tiny_base_folder, method):
    """A run that goes on from an adapter may be compared with the base."""
    base = model_of(tiny_base_folder, trained=False)
    wanted = objective("dpo")
    wanted.begin(base)
    model = model_of(tiny_base_folder, method=method)
    fuse(model)
    made = objective("dpo", reference=Reference(("other",), adapters_off=True, budget=60))
    before = answer_scores(model, made.batch(range(6)).sequences)[0]
    made.begin(model)
    torch.testing.assert_close(made.batch(range(6)).reference, wanted.batch(range(6)).reference, rtol=1e-4, atol=1e-4)
    after = answer_scores(model, made.batch(range(6)).sequences)[0]
    assert torch.equal(before, after)  # and on again, fused as before


def test_half_precision_keeps_the_start_exact(tiny_base_folder):
    """The reference is computed on the path that trains, so rounding in 16 bits takes no side."""
    model = model_of(tiny_base_folder, trained=False, dtype=torch.bfloat16)
    fuse(model)
    made = objective("dpo", n=16)
    made.begin(model)
    found = made.loss(model, made.batch(range(16)))
    assert (found.each - math.log(2)).abs().max() < 0.1


def test_padding_of_sequences():
    found = pad([([1, 2, 3], [-100, 2, 3]), ([4], [4])], 9, "cpu")
    assert found.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert found.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert found.labels.tolist() == [[-100, 2, 3], [4, -100, -100]]
