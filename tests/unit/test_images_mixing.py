"""Mixes of adapters on live components, against dense weights in float64 that are written out from the files."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from haori.core.errors import InputError
from haori.images.adapters import PictureAdapter, read_picture_adapter
from haori.images.mixing import Mix, Mixer, Strength
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.mixed_files import BLOCK, Written, every_kind

# As a share of the effect: far below the tenth that a wrong factor makes.
SHARE = 1e-3
# On the fly with weights written out for each mix, or with thin factors beside those of the base.
COPIES = {"merged": 1 << 30, "whole": 1 << 30, "thin": 0}


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    pipe = stable_diffusion()
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


class Sample:
    """Two adapters with what they change, and inputs of the components."""

    def __init__(self, components: dict[str, Any], folder: Path) -> None:
        self.components = components
        self.written = [every_kind(components, seed) for seed in (1, 2)]
        self.read: list[PictureAdapter] = [
            read_picture_adapter(one.save(folder / f"{at}.safetensors"), components, base="tiny")
            for at, one in enumerate(self.written)
        ]
        numbers = torch.Generator().manual_seed(7)
        self.noisy = torch.randn(6, 4, 8, 8, generator=numbers)
        self.states = torch.randn(6, 5, 24, generator=numbers)
        self.ids = torch.randint(3, 60, (6, 7), generator=numbers)

    def mix(self, *strengths: float | tuple[float, float]) -> Mix:
        pairs = [one if isinstance(one, tuple) else (one, one) for one in strengths]
        return tuple(Strength(adapter, unet, text) for adapter, (unet, text) in zip(self.read, pairs, strict=False))

    def run(self, component: str, rows: Sequence[int], model: Any = None) -> Tensor:
        model = model or self.components[component]
        at = list(rows)
        dtype = next(model.parameters()).dtype
        with torch.no_grad():
            if component == "unet":
                found: Tensor = model(self.noisy[at].to(dtype), 500, self.states[at].to(dtype)).sample
            else:
                found = model(self.ids[at]).last_hidden_state
        return found.double()

    def dense(self, component: str, rows: Sequence[int], mix: Mix) -> Tensor:
        """Run a copy in float64 whose weights are W + sum m dW, by the formulas of the files."""
        return self.run(
            component, rows, with_dense(self.components[component], component, self.weights(component, mix))
        )

    def weights(self, component: str, mix: Mix) -> list[tuple[Written, float]]:
        return [
            (self.written[self.read.index(one.adapter)], one.denoiser if component == "unet" else one.text_encoder)
            for one in mix
        ]


def with_dense(model: Any, component: str, parts: list[tuple[Written, float]]) -> Any:
    found = copy.deepcopy(model).double()
    for name, module in model.named_modules():
        target = found.get_submodule(name)
        for written, strength in parts:
            full = f"{component}.{name}"
            if full in written.weights:
                target.weight.data += strength * written.weights[full](module.weight.detach().double())
            if full in written.biases:
                target.bias.data += strength * written.biases[full]
    return found


def assert_same(found: Tensor, wanted: Tensor, base: Tensor, share: float = SHARE) -> None:
    effect = (wanted - base).norm()
    assert effect > 0
    assert (found - wanted).norm() <= share * effect


@pytest.fixture(scope="module")
def sample(components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(components, tmp_path_factory.mktemp("files"))


def bits(components: dict[str, Any]) -> dict[str, bytes]:
    return {
        f"{name}.{key}": value.numpy().tobytes()
        for name, model in components.items()
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("strengths", [(1.0,), (0.4, 0.6), (-0.5, 1.3)])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("way", ["merged", "whole", "thin"])
def test_a_mix_is_the_weight_and_the_sum_of_changes(
    sample: Sample, component: str, way: str, strengths: tuple[float, ...]
) -> None:
    mix, rows = sample.mix(*strengths), [0, 1]
    before, base = bits(sample.components), sample.run(component, rows)
    mixer = Mixer(sample.components, copies_bytes=COPIES[way])
    with mixer.merged(mix) if way == "merged" else mixer.on_the_fly([mix]):
        found = sample.run(component, rows)
    wanted = sample.dense(component, rows, mix)
    assert_same(found, wanted, base)
    with pytest.raises(AssertionError):  # a tenth of one adapter's strength is told
        assert_same(found, sample.dense(component, rows, sample.mix(strengths[0] * 1.1, *strengths[1:])), base)
    assert bits(sample.components) == before
    assert torch.equal(sample.run(component, rows), base)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize(("way", "times"), [("whole", 1), ("whole", 2), ("thin", 2)])
def test_pictures_of_a_batch_have_mixes_of_their_own(sample: Sample, component: str, way: str, times: int) -> None:
    mixes = [sample.mix(0.8), (), sample.mix(0.4, 0.6)]
    rows = list(range(3 * times))
    base = sample.run(component, rows)
    mixer = Mixer(sample.components, copies_bytes=COPIES[way])
    with mixer.on_the_fly(mixes):
        found = sample.run(component, rows)
    for row in rows:
        mix = mixes[row % 3]
        if not mix:
            assert torch.allclose(found[row], base[row], atol=1e-6)
            continue
        assert_same(found[row : row + 1], sample.dense(component, [row], mix), base[row : row + 1])
        with mixer.merged(mix):
            alone = sample.run(component, [row])
        assert torch.allclose(found[row : row + 1], alone, atol=2e-5)


def test_strengths_of_denoiser_and_text_encoder_are_their_own(sample: Sample) -> None:
    mix = sample.mix((1.0, 0.0), (0.0, 0.5))
    for component in ("unet", "text_encoder"):
        base = sample.run(component, [0])
        with Mixer(sample.components).merged(mix):
            found = sample.run(component, [0])
        assert_same(found, sample.dense(component, [0], mix), base)


def test_one_adapter_twice_counts_with_the_sum(sample: Sample) -> None:
    mix = (*sample.mix(0.3), *sample.mix(0.5))
    base = sample.run("unet", [0])
    with Mixer(sample.components).on_the_fly([mix]):
        found = sample.run("unet", [0])
    assert_same(found, sample.dense("unet", [0], sample.mix(0.8)), base)


def test_a_schedule_changes_the_denoiser_from_step_to_step(sample: Sample) -> None:
    first, second = sample.read

    def early(share: float) -> float:
        return 1.0 if share < 0.5 else 0.0

    mixes = [(Strength(first, 0.7, 0.7, early),), (Strength(second, 0.9, 0.9, lambda share: 1 - share),)]
    rows = [0, 1, 2, 3]
    base = sample.run("unet", rows)
    steps = {0.0: (1.0, 1.0), 0.4: (1.0, 0.6), 0.75: (0.0, 0.25), 0.1: (1.0, 0.9)}
    found = {}
    with Mixer(sample.components).on_the_fly(mixes) as on:
        for share in steps:
            on.scale(share)
            found[share] = sample.run("unet", rows)
        text = sample.run("text_encoder", [0, 1])
    for share, factors in steps.items():
        of_first, of_second = 0.7 * factors[0], 0.9 * factors[1]
        for row in (0, 3):
            mix = sample.mix(of_first) if row % 2 == 0 else sample.mix(0.0, of_second)
            if (of_first, of_second)[row % 2]:
                assert_same(found[share][row : row + 1], sample.dense("unet", [row], mix), base[row : row + 1])
            else:
                assert torch.allclose(found[share][row], base[row], atol=1e-6)
    of_text = sample.dense("text_encoder", [0], sample.mix(0.7))
    assert_same(text[:1], of_text, sample.run("text_encoder", [0]))


@pytest.mark.parametrize("way", ["merged", "on_the_fly"])
def test_the_base_is_itself_again_after_a_failure_inside(sample: Sample, way: str) -> None:
    before, base = bits(sample.components), sample.run("unet", [0])
    mixer = Mixer(sample.components)
    mix = sample.mix(0.4, 0.6)
    with pytest.raises(KeyboardInterrupt), mixer.merged(mix) if way == "merged" else mixer.on_the_fly([mix, ()]):
        raise KeyboardInterrupt
    assert bits(sample.components) == before
    assert torch.equal(sample.run("unet", [0]), base)
    assert not any("forward" in vars(m) for model in sample.components.values() for m in model.modules())
    with mixer.merged(mix):  # and it can be used again
        assert not torch.equal(sample.run("unet", [0]), base)


def test_weights_of_the_last_mix_are_those_of_that_mix(sample: Sample) -> None:
    mixer, base = Mixer(sample.components), sample.run("unet", [0])
    for strengths in ((0.4, 0.6), (0.4, 0.6), (0.4,), (0.5,), (0.4, 0.6)):
        with mixer.merged(sample.mix(*strengths)):
            found = sample.run("unet", [0])
        assert_same(found, sample.dense("unet", [0], sample.mix(*strengths)), base)
        with mixer.merged(()):
            assert torch.equal(sample.run("unet", [0]), base)


def test_what_cannot_be_put_on_is_refused(sample: Sample) -> None:
    mixer, mix = Mixer(sample.components), sample.mix(1.0)
    with mixer.merged(mix), pytest.raises(InputError, match="on already"), mixer.merged(mix):
        pass
    with pytest.raises(InputError, match="changes from step to step"):
        mixer.merged((Strength(sample.read[0], schedule=lambda share: share),)).__enter__()
    with pytest.raises(InputError, match="no picture"), mixer.on_the_fly([]):
        pass
    with mixer.on_the_fly([mix, ()]), pytest.raises(InputError, match=r"3 rows .* 2 pictures"):
        sample.run("unet", [0, 1, 2])


def test_merging_is_chosen_for_one_mix_that_stays(sample: Sample) -> None:
    mixer, mix, other = Mixer(sample.components), sample.mix(0.4, 0.6), sample.mix(0.4, 0.5)
    assert mixer.choose([mix, mix]) == "merged"
    assert mixer.choose([mix, other]) == "on_the_fly"
    assert mixer.choose([(Strength(sample.read[0], schedule=lambda share: share),)]) == "on_the_fly"


@pytest.mark.parametrize("bits", [8, 4])
def test_over_quantised_weights_a_lora_acts_beside_them(bits: int, tmp_path: Path) -> None:
    from haori.bases import find_base, load_model
    from haori.core.quantization import Quantization

    base = find_base(str(saved(stable_diffusion(), tmp_path / "tiny")))
    model: Any = load_model(base, dtype="fp32", device="cpu", quantization=Quantization(bits))
    components = dict(model.named_children())
    names = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.2"]
    plain, dora = Written(1), Written(2)
    layers = {name: torch.nn.Linear(*reversed(stable_layer(name))) for name in names}
    deltas = {name: plain.lora(name, layer) for name, layer in layers.items()}
    dora.dora(names[0], layers[names[0]])
    adapter, other = (
        read_picture_adapter(one.save(tmp_path / f"{at}.safetensors"), components, base="tiny")
        for at, one in enumerate((plain, dora))
    )
    mixer, mix = Mixer(components), (Strength(adapter, 0.6),)
    assert mixer.choose([mix]) == "on_the_fly"
    with pytest.raises(InputError, match="quantised"), mixer.merged(mix):
        pass
    with pytest.raises(InputError, match="quantised"), mixer.on_the_fly([(Strength(other),)]):
        pass
    numbers = torch.Generator().manual_seed(7)
    noisy, states = torch.randn(2, 4, 8, 8, generator=numbers), torch.randn(2, 5, 24, generator=numbers)
    with torch.no_grad():
        bare = model.unet(noisy, 500, states).sample
        with mixer.on_the_fly([mix, ()]):
            found = model.unet(noisy, 500, states).sample
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: out + 0.6 * args[0] @ deltas[name].T.float()
            )
            for name in names
        ]
        wanted = model.unet(noisy, 500, states).sample
        for hook in hooks:
            hook.remove()
    assert torch.allclose(found[1], bare[1], atol=1e-6)
    assert_same(found[:1], wanted[:1], bare[:1], share=1e-2)  # rounding of 8-bit inputs is the base's own


def stable_layer(name: str) -> tuple[int, int]:
    shape = stable_diffusion().unet.get_submodule(name.removeprefix("unet.")).weight.shape
    return int(shape[0]), int(shape[1])
