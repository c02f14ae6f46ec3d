"""A blend is sum_i w_i dW_i in float64, for every kind of update; TIES, DARE and KnOTS are their papers' formulas."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from haori.core.errors import InputError, MismatchError
from haori.library.combining.blending import BlendOptions, Part, blend_updates
from haori.library.updates import AdapterUpdates, ModuleUpdate

OUT, IN = 24, 40
NAME = "model.layers.0.q_proj"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 17 * sum(shape)))


def lora(rank: int, *, seed: int, alpha: float | None = None, rslora: bool = False, out: int = OUT) -> ModuleUpdate:
    factors = {"A": random(rank, IN, seed=seed), "B": random(out, rank, seed=seed + 1)}
    return ModuleUpdate("lora", factors, alpha=alpha, rslora=rslora)


def adapter(update: ModuleUpdate | dict[str, ModuleUpdate], **fields: object) -> AdapterUpdates:
    return AdapterUpdates(update if isinstance(update, dict) else {NAME: update}, **fields)  # type: ignore[arg-type]


def blended(*parts: tuple[ModuleUpdate, float], weight: Tensor | None = None, **options: object) -> ModuleUpdate:
    named = [Part(f"part{place}", adapter(update), factor) for place, (update, factor) in enumerate(parts)]
    of = None if weight is None else (lambda _: weight)
    return blend_updates(named, BlendOptions(**options), weight_of=of).updates.modules[NAME]  # type: ignore[arg-type]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def product(a: Tensor, b: Tensor) -> Tensor:
    return b.double() @ a.double()


def hand_written() -> list[tuple[ModuleUpdate, Tensor]]:
    """Updates of every kind, with dW written out by the formula of its paper."""
    a, b = random(4, IN, seed=1), random(OUT, 4, seed=2)
    plain = (ModuleUpdate("lora", {"A": a, "B": b}, alpha=6.0), 6.0 / 4 * product(a, b))
    rooted = (ModuleUpdate("lora", {"A": a, "B": b}, alpha=6.0, rslora=True), 6.0 / math.sqrt(4) * product(a, b))
    w = [random(OUT, 3, seed=3), random(3, IN, seed=4), random(OUT, 3, seed=5), random(3, IN, seed=6)]
    loha = ModuleUpdate("loha", dict(zip(("w1_a", "w1_b", "w2_a", "w2_b"), w, strict=True)), alpha=1.5)
    hadamard = 0.5 * product(w[1], w[0]) * product(w[3], w[2])
    w1, w2_a, w2_b = random(4, 5, seed=7), random(6, 2, seed=8), random(2, 8, seed=9)
    lokr = ModuleUpdate("lokr", {"w1": w1, "w2_a": w2_a, "w2_b": w2_b}, alpha=3.0)
    kronecker = 1.5 * torch.einsum("ab,cd->acbd", w1.double(), product(w2_b, w2_a)).reshape(OUT, IN)
    diff = random(OUT, IN, seed=10)
    return [plain, rooted, (loha, hadamard), (lokr, kronecker), (ModuleUpdate("diff", {"diff": diff}), diff.double())]


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("second", range(5))
def test_a_blend_is_the_weighted_sum_of_any_two_kinds(first: int, second: int) -> None:
    (one, of_one), (two, of_two) = hand_written()[first], hand_written()[second]
    expected = 0.4 * of_one - 1.7 * of_two
    assert error(blended((one, 0.4), (two, -1.7)).delta(), expected) < 1e-6
    full = blended((one, 0.4), (two, -1.7), rank=OUT)
    assert full.kind == "lora"
    assert error(full.delta(), expected) < 1e-6
    assert error(full.delta(), 0.36 * of_one - 1.7 * of_two) > 1e-3, "a fault of a tenth would be seen"


def test_three_ranks_and_scales_and_a_negative_weight() -> None:
    parts = [
        (lora(2, seed=1, alpha=16.0), 0.2),
        (lora(8, seed=2, alpha=8.0, rslora=True), 0.5),
        (lora(3, seed=3), -0.3),
    ]
    scales = [16 / 2, 8 / math.sqrt(8), 1.0]
    expected = sum(
        w * s * product(update.factors["A"], update.factors["B"]) for (update, w), s in zip(parts, scales, strict=True)
    )
    assert isinstance(expected, Tensor)
    found = blended(*parts)
    assert found.rank == 13
    assert error(found.delta(), expected) < 1e-6


def test_four_tenths_and_six_tenths_are_not_squared() -> None:
    """Averaging A and B by themselves gives 0.16, 0.36 and cross terms."""
    one, two = lora(4, seed=1), lora(4, seed=5)
    d1, d2 = (product(update.factors["A"], update.factors["B"]) for update in (one, two))
    found = blended((one, 0.4), (two, 0.6)).delta()
    assert error(found, 0.4 * d1 + 0.6 * d2) < 1e-6
    mixed = {key: 0.4 * one.factors[key] + 0.6 * two.factors[key] for key in ("A", "B")}
    mistaken = product(mixed["A"], mixed["B"])
    cross = 0.24 * (product(two.factors["A"], one.factors["B"]) + product(one.factors["A"], two.factors["B"]))
    assert error(mistaken, 0.16 * d1 + 0.36 * d2 + cross) < 1e-6
    assert error(found, mistaken) > 0.3


def test_modules_that_one_adapter_has_count_with_the_others_zero() -> None:
    shared, alone = lora(2, seed=1), lora(3, seed=2, alpha=12.0)
    one = Part("one", adapter({"model.q": shared, "model.k": alone}), 0.4)
    two = Part("two", adapter({"model.q": lora(2, seed=9)}), 0.6)
    modules = blend_updates([one, two], BlendOptions()).updates.modules
    assert set(modules) == {"model.q", "model.k"}
    assert error(modules["model.k"].delta(), 0.4 * 4.0 * product(alone.factors["A"], alone.factors["B"])) < 1e-6


def test_one_adapter_at_weight_1_keeps_its_factors() -> None:
    update = lora(4, seed=1, alpha=2.0)
    given = adapter(update)
    assert blend_updates([Part("a", given, 1.0)], BlendOptions()).updates is given
    beside_nothing = blend_updates([Part("a", given, 1.0), Part("b", adapter(lora(2, seed=7)), 0.0)], BlendOptions())
    assert beside_nothing.updates is given


def test_directions_in_common_are_not_kept_twice() -> None:
    update = lora(4, seed=1, alpha=8.0)
    found = blended((update, 0.4), (update, 0.6))
    assert found.rank == 4
    assert error(found.delta(), update.delta()) < 1e-6


def test_more_ranks_than_the_matrix_has_stay_exact() -> None:
    parts = [(lora(16, seed=seed), 0.5) for seed in (1, 2)]
    found = blended(*parts)
    assert found.rank == OUT
    assert error(found.delta(), 0.5 * (parts[0][0].delta() + parts[1][0].delta())) < 1e-6


@pytest.mark.parametrize("mid", [False, True])
def test_convolutions(mid: bool) -> None:
    kernel = {"A": random(4, 10, 3, 3, seed=1), "B": random(OUT, 4, 1, 1, seed=2)}
    plain = ModuleUpdate("lora", kernel, alpha=2.0)
    expected = 0.5 * torch.einsum("or,rikl->oikl", kernel["B"][:, :, 0, 0].double(), kernel["A"].double())
    if mid:
        tucker = {
            "A": random(4, 10, 1, 1, seed=3),
            "B": random(OUT, 4, 1, 1, seed=4),
            "mid": random(4, 4, 3, 3, seed=5),
        }
        other = ModuleUpdate("lora", tucker, alpha=4.0)
        second = torch.einsum(
            "ijkl,oi,jq->oqkl", tucker["mid"].double(), tucker["B"][..., 0, 0].double(), tucker["A"][..., 0, 0].double()
        )
    else:
        flat = random(OUT, 90, seed=6)  # a LoHa of a convolution does not say its kernel
        halves = {
            "w1_a": flat[:, :2],
            "w1_b": random(2, 90, seed=7),
            "w2_a": flat[:, 2:4],
            "w2_b": random(2, 90, seed=8),
        }
        other = ModuleUpdate("loha", halves)
        second = (product(halves["w1_b"], halves["w1_a"]) * product(halves["w2_b"], halves["w2_a"])).reshape(
            OUT, 10, 3, 3
        )
    found = blended((plain, 0.25), (other, 2.0))
    assert found.kind == "lora"
    assert found.delta().shape == (OUT, 10, 3, 3)
    assert error(found.delta(), 0.25 * expected + 2.0 * second) < 1e-6


def test_biases_and_norms_add_up() -> None:
    one = ModuleUpdate("lora", lora(2, seed=1).factors, bias=random(OUT, seed=1))
    two = ModuleUpdate("lora", lora(2, seed=2).factors, bias=random(OUT, seed=2))
    assert one.bias is not None and two.bias is not None
    found = blended((one, 0.5), (two, -2.0)).bias
    assert found is not None
    assert error(found, 0.5 * one.bias.double() - 2.0 * two.bias.double()) < 1e-6
    norms = [ModuleUpdate("diff", {"diff": random(OUT, seed=seed)}) for seed in (3, 4)]
    for method in ("linear", "ties"):
        found = blended((norms[0], 0.5), (norms[1], 1.0), method=method, rank=2).delta()
        assert error(found, 0.5 * norms[0].delta() + norms[1].delta()) < 1e-6


def test_truncation_is_the_nearest_of_its_rank_and_reports_what_it_kept() -> None:
    parts = [(lora(6, seed=1, alpha=12.0), 0.4), (lora(6, seed=2), 0.6)]
    expected = sum(w * update.delta() for update, w in parts)
    assert isinstance(expected, Tensor)
    u, s, vh = torch.linalg.svd(expected, full_matrices=False)
    blend = blend_updates([Part(str(i), adapter(u), w) for i, (u, w) in enumerate(parts)], BlendOptions(rank=5))
    assert error(blend.updates.modules[NAME].delta(), (u[:, :5] * s[:5]) @ vh[:5]) < 1e-6
    share = float(s[:5].square().sum() / s.square().sum())
    assert blend.energy.modules[NAME].share == pytest.approx(share, rel=1e-9)
    assert 0.3 < share < 0.95
    assert f"{share:.2%} in all" in blend.energy.sentence()
    assert NAME in blend.energy.sentence()


def dora(by_input: bool = False) -> tuple[ModuleUpdate, Tensor, Tensor]:
    """Return a DoRA, its W, and by how much it changes W, from Liu et al. 2024, eq. 5."""
    plain, weight = lora(3, seed=4, alpha=6.0), random(OUT, IN, seed=5).double()
    magnitude = random(1, IN, seed=6) if by_input else random(OUT, seed=6)
    changed = weight + 2.0 * product(plain.factors["A"], plain.factors["B"])
    if by_input:
        after = magnitude.double() * changed / changed.square().sum(dim=0, keepdim=True).sqrt()
    else:
        after = magnitude.double()[:, None] * changed / changed.square().sum(dim=1, keepdim=True).sqrt()
    return ModuleUpdate("lora", plain.factors, alpha=6.0, magnitude=magnitude), weight, after - weight


@pytest.mark.parametrize("by_input", [False, True])
def test_dora_is_refused_without_a_rank_and_converted_with_one(by_input: bool) -> None:
    update, weight, change = dora(by_input)
    other = lora(2, seed=9)
    with pytest.raises(MismatchError, match=r"'part0' is a DoRA.*Give --rank"):
        blended((update, 0.4), (other, 0.6), weight=weight)
    with pytest.raises(MismatchError, match="DoRA"):
        blended((update, 0.4), weight=weight)
    expected = 0.4 * change + 0.6 * other.delta()
    assert error(blended((update, 0.4), (other, 0.6), weight=weight, rank=OUT).delta(), expected) < 1e-6
    part = [Part("a", adapter(update), 0.4), Part("b", adapter(other), 0.6)]
    energy = blend_updates(part, BlendOptions(rank=4), weight_of=lambda _: weight).energy
    s = torch.linalg.svdvals(expected).square()
    assert energy.share == pytest.approx(float(s[:4].sum() / s.sum()), rel=1e-9)
    assert blend_updates([Part("a", adapter(update), 1.0)], BlendOptions()).updates.modules[NAME] is update


@pytest.mark.parametrize(("method", "oracle"), [("ties", "ties"), ("dare", "dare_linear"), ("dare-ties", "dare_ties")])
def test_ties_and_dare_are_those_of_peft(method: str, oracle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils import merge_utils

    from haori.library.combining import weighing

    updates = [lora(4, seed=seed, alpha=8.0) for seed in (1, 4, 8)]
    weights = [0.5, 1.0, -0.7]
    deltas = [2.0 * product(update.factors["A"], update.factors["B"]) for update in updates]
    masks = [random(OUT, IN, seed=seed) > 0 for seed in (30, 31, 32)]
    # Which values DARE drops is chance: both get the same.
    draws = [iter(masks), iter(masks)]
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(draws[0]).double())
    monkeypatch.setattr(Tensor, "bernoulli_", lambda self, *_, **__: self.copy_(next(draws[1])))
    expected = getattr(merge_utils, oracle)(deltas, torch.tensor(weights, dtype=torch.float64), 0.3)
    found = weighing.merge_of(method)(deltas, weights, 0.3, 0)
    assert error(found, expected) < 1e-12
    assert error(0.9 * found, expected) > 0.05


def test_ties_of_the_paper_by_hand() -> None:
    """Trim to 2 of 4, elect, average what agrees; the expected values are worked out on paper."""
    from haori.library.combining.weighing import merge_of

    one = torch.tensor([[3.0, -2.0, 0.5, 0.1]], dtype=torch.float64)
    two = torch.tensor([[1.0, 4.0, -0.2, -2.5]], dtype=torch.float64)
    # trimmed: [3, -2, 0, 0] and [0, 4, 0, -2.5]; signs elected: +, +, (none), -
    expected = torch.tensor([[3.0, 4.0, 0.0, -2.5]], dtype=torch.float64)
    assert torch.equal(merge_of("ties")([one, two], [1.0, 1.0], 0.5, 0), expected)


def test_dare_keeps_a_share_and_divides_by_it() -> None:
    from haori.library.combining.weighing import merge_of

    ones = torch.ones(200, 200, dtype=torch.float64)
    found = merge_of("dare")([ones], [2.0], 0.25, 7)
    assert set(found.flatten().tolist()) == {0.0, 8.0}
    assert float((found > 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(found, merge_of("dare")([ones], [2.0], 0.25, 7))
    assert not torch.equal(found, merge_of("dare")([ones], [2.0], 0.25, 8))


def test_a_blend_by_ties_is_the_svd_of_the_merged_matrix() -> None:
    from peft.utils.merge_utils import ties

    updates = [lora(4, seed=seed, alpha=8.0) for seed in (1, 4)]
    merged = ties([update.delta() for update in updates], torch.tensor([1.0, 1.0]), 0.4)
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    assert (
        error(blended((updates[0], 1.0), (updates[1], 1.0), method="ties", density=0.4, rank=OUT).delta(), merged)
        < 1e-6
    )
    found = blended((updates[0], 1.0), (updates[1], 1.0), method="ties", density=0.4)
    assert found.rank == 8, "the sum of the ranks, where none is given"
    assert error(found.delta(), (u[:, :8] * s[:8]) @ vh[:8]) < 1e-6


def test_knots_is_the_papers() -> None:
    """SVD of the full [dW1, dW2], TIES of the V_i by PEFT's own functions, and U S V."""
    from peft.utils.merge_utils import ties

    updates = [lora(3, seed=1, alpha=6.0), lora(5, seed=4)]
    weights = [1.0, 0.8]
    u, s, vh = torch.linalg.svd(torch.cat([update.delta() for update in updates], dim=1), full_matrices=False)
    merged = ties(list(vh[:8].chunk(2, dim=1)), torch.tensor(weights), 0.3)
    expected = (u[:, :8] * s[:8]) @ merged
    found = blended((updates[0], weights[0]), (updates[1], weights[1]), method="knots-ties", density=0.3)
    assert found.rank is not None and found.rank <= 8
    assert error(found.delta(), expected) < 1e-6


def test_stock_peft_blends_alike(tiny_base_folder: Path) -> None:
    """add_weighted_adapter by `cat` of two real adapters of other ranks and scales gives the same dW."""
    from peft import LoraConfig

    from tests.library_samples import stock_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
        model = stock_model(tiny_base_folder, LoraConfig(r=4, lora_alpha=8, **kinds))
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, use_rslora=True, **kinds))
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.data = random(*parameter.shape, seed=len(name))
        model.add_weighted_adapter(["default", "second"], [0.4, 0.6], "both", combination_type="cat")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    parts = [
        ModuleUpdate("lora", {"A": layer.lora_A[k].weight.data, "B": layer.lora_B[k].weight.data}, alpha, rs)
        for k, alpha, rs in (("default", 8.0, False), ("second", 6.0, True))
    ]
    found = blended((parts[0], 0.4), (parts[1], 0.6))
    assert error(found.delta(), layer.get_delta_weight("both").detach().double()) < 1e-5


@pytest.mark.parametrize(("options", "said"), [
    ({"method": "tie"}, "did you mean 'ties'"), ({"density": 0.0}, "above 0 and at most 1"),
    ({"rank": 0}, "at least 1"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        blended((lora(2, seed=1), 1.0), (lora(2, seed=2), 1.0), **options)


def test_what_cannot_be_added_is_refused() -> None:
    with pytest.raises(MismatchError, match="do not add up"):
        blended((lora(2, seed=1), 1.0), (lora(2, seed=2, out=12), 1.0))
    with pytest.raises(InputError, match="All weights are zero"):
        blended((lora(2, seed=1), 0.0))
    with pytest.raises(InputError, match="finite"):
        blended((lora(2, seed=1), float("nan")))
    head = [adapter(lora(2, seed=1), extra={"score.weight": random(2, 4, seed=s)}) for s in (1, 2)]
    with pytest.raises(MismatchError, match=r"'one' holds 'score.weight' whole"):
        blend_updates([Part("one", head[0], 0.5), Part("two", head[1], 0.5)], BlendOptions())
