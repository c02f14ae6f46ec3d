"""Every kind of method on a tiny pipeline: trained, resumed bit for bit, proved, read by stock PEFT and diffusers."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from haori.core.errors import HaoriError
from haori.core.events import discard
from haori.library import export_in_format
from haori.tasks.recipe import recipe_from
from haori.training.finish import prove_and_store, prove_model
from haori.training.preparation import Prepared, prepare
from haori.training.session import opened_loop, train_prepared
from tests.diffusion_pipelines import flux1, saved, stable_diffusion, stable_diffusion_xl
from tests.pictures import picture, picture_folder

WITH_CONVOLUTIONS = "method.target=[all-linear,convolutions]"
SMALL: dict[str, Any] = {"block_out_channels": (8, 16), "attention_head_dim": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from haori.core.settings import settings

    folder = tmp_path_factory.mktemp("methods")
    saved(stable_diffusion(**SMALL), folder / "sd15")
    picture_folder(folder / "data", 4, size=(32, 32), caption="a red cat {}")
    yield folder
    settings.cache_clear()


@pytest.fixture(autouse=True)
def shared_home(root: Path, haori_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_HOME", str(root / "home"))
    settings.cache_clear()


def prepared(root: Path, *overrides: str, base: str = "sd15", data: str = "data") -> Prepared:
    document = {"name": "x", "task": "text_to_image", "base": str(root / base), "data": {"path": str(root / data)}}
    fixed = [
        "data.resolution=32", "data.bucket_step=8", "data.validation_share=0", "training.epochs=9",
        "samples.prompts=[]", "training.max_steps=2", "training.save_every=1", "training.batch_size=2",
        "training.dtype=fp32", "optimizer.lr=0.02",
        *([] if any("{kind" in item for item in overrides) else ["method.rank=4"]),
    ]  # fmt: skip
    return prepare(recipe_from(document, [*fixed, *overrides]))


METHODS = {
    "rslora": ["method.rslora=true", "method.rank_pattern={to_q: 2}", "method.lr_ratio=16", WITH_CONVOLUTIONS],
    "dora": ["method.kind=dora", WITH_CONVOLUTIONS],
    "adalora": ["method.kind=adalora", WITH_CONVOLUTIONS, "training.max_steps=4", "training.save_every=2"],
    "ard_lora": ["method.kind=ard_lora", WITH_CONVOLUTIONS, "training.max_steps=4", "training.save_every=2"],
    "lokr": ["method={kind: peft, type: LOKR, target: attention, options: {r: 2}}"],
    "loha": ["method={kind: peft, type: LOHA, target: [attention, convolutions], options: {r: 2}}"],
    "qlora": ["method.kind=qlora", "method.target=attention"],
    "loftq": ["method.kind=qlora", "method.init=loftq", "method.target=attention", "training.dtype=bf16"],
    "ema": ["training.ema=0.5", "training.gradient_checkpointing=true", "training.text_encoder=true"],
}
SLOW = {"dora", "adalora", "loha", "loftq"}
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in METHODS]
DRAWN_BY_DIFFUSERS = {"rslora", "adalora", "ard_lora"}


@pytest.mark.parametrize("name", CASES)
def test_a_method_from_pictures_to_stock_tools(root: Path, tmp_path: Path, name: str) -> None:
    run = prepared(root, f"name={name}", *METHODS[name])
    (tmp_path / "whole").mkdir()
    trained = train_prepared(run, tmp_path / "whole", None, "2026-01-01T00:00:00+00:00", discard)
    stored = prove_and_store(run, tmp_path / "whole", trained.record, trained.live, discard)
    assert stored.card.verification is not None and stored.card.verification.passed
    first = sorted((tmp_path / "whole" / "checkpoints").iterdir())[0]
    shutil.copytree(first, tmp_path / "again" / "checkpoints" / first.name)
    train_prepared(run, tmp_path / "again", first, "2026-01-01T00:00:00+00:00", discard)
    one, other = (tmp_path / part / "adapter" / "adapter_model.safetensors" for part in ("whole", "again"))
    assert one.read_bytes() == other.read_bytes()
    if name == "ema":
        return
    assert trained.live is not None
    plain = name not in {"qlora", "loftq"}  # their live model is the quantised one
    export_in_format(name, tmp_path / "peft", "peft")
    theirs = noise_of_peft(root, tmp_path / "peft", trained.live.probes)
    if plain:
        check_alike(root, theirs, trained.live.logits, trained.live.probes)
    export_in_format(name, tmp_path / "kohya.safetensors", "kohya")
    if name in DRAWN_BY_DIFFUSERS or not plain:
        for kind in ("kohya", "diffusers"):
            if kind == "diffusers":
                export_in_format(name, tmp_path / "diffusers.safetensors", "diffusers")
            check_alike(root, noise_of_diffusers(root, tmp_path / f"{kind}.safetensors", trained.live.probes), theirs,
                        trained.live.probes)  # fmt: skip


def stock_unet(root: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(root / "sd15" / "unet", local_files_only=True).eval()


@torch.no_grad()
def noise(unet: Any, probes: Any) -> list[torch.Tensor]:
    return [unet(p["noisy"], p["timesteps"], p["text_states"].float()).sample.reshape(-1, 1) for p in probes]


def noise_of_peft(root: Path, folder: Path, probes: Any) -> list[torch.Tensor]:
    from peft import PeftModel

    (part,) = (path for path in folder.iterdir() if path.is_dir())
    return noise(PeftModel.from_pretrained(stock_unet(root), part).eval(), probes)


def noise_of_diffusers(root: Path, file: Path, probes: Any) -> list[torch.Tensor]:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(root / "sd15", safety_checker=None, local_files_only=True)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return noise(pipeline.unet, probes)


def check_alike(root: Path, found: Any, expected: Any, probes: Any) -> None:
    bare = noise(stock_unet(root), probes)
    effect = (torch.cat(expected) - torch.cat(bare)).norm()
    assert effect > 1e-3 * torch.cat(bare).norm()
    assert (torch.cat(found) - torch.cat(expected)).norm() < 0.02 * effect


def test_text_encoders_learn_at_their_own_rate(root: Path, tmp_path: Path) -> None:
    """The groups that AdamW really has, for both text encoders of SDXL, at LoRA+'s ratio."""
    saved(stable_diffusion_xl(), root / "sdxl")
    run = prepared(root, "training.text_encoder=true", "method.lr_ratio=4", "optimizer.lr=0.01",
                   "optimizer.text_encoder_lr=0.002", base="sdxl")  # fmt: skip
    with opened_loop(run, tmp_path) as loop:
        names = {id(parameter): name for name, parameter in loop.model.named_parameters()}
        rates = {
            names[id(parameter)]: group["rate"] * 0.01
            for group in loop.optimizer.param_groups
            for parameter in group["params"]
        }
    trained = {name for name, parameter in loop.model.named_parameters() if parameter.requires_grad}
    assert set(rates) == trained
    for name, rate in rates.items():
        own = 0.002 if ".text_encoder" in name else 0.01
        assert rate == pytest.approx(own * (4 if "lora_B" in name else 1)), name
    parts = {name.removeprefix("base_model.model.").partition(".")[0] for name in rates}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}


def test_checkpointing_keeps_far_less_and_changes_no_gradient(root: Path, tmp_path: Path) -> None:
    kept, gradients = {}, {}
    for wanted in ("false", "true"):
        run = prepared(root, f"training.gradient_checkpointing={wanted}", "training.text_encoder=true")
        with opened_loop(run, tmp_path) as loop:
            torch.manual_seed(0)
            batch = run.train.batch([0, 1])
            sizes: list[int] = []
            loop.model.train()

            def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
                sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = run.train.loss(loop.model, batch).total
            kept[wanted] = sum(sizes)
            loss.backward()
            gradients[wanted] = {n: p.grad.clone() for n, p in loop.model.named_parameters() if p.grad is not None}
    assert kept["true"] < 0.3 * kept["false"]
    assert gradients["true"].keys() == gradients["false"].keys()
    assert any(gradient.any() for gradient in gradients["true"].values())
    for name, gradient in gradients["true"].items():
        torch.testing.assert_close(gradient, gradients["false"][name], rtol=1e-4, atol=1e-7)


def test_a_step_of_several_sizes_and_turns_has_the_gradient_of_one_batch(root: Path, tmp_path: Path) -> None:
    """Against autograd in float64 over the mean of the pictures' losses, each computed alone."""
    data = picture_folder(root / "sizes", 2, size=(32, 32))
    for number, size in ((7, (64, 32)), (8, (32, 64)), (9, (64, 32))):
        picture(number, size).save(data / f"wide{number}.png")
        (data / f"wide{number}.txt").write_text("a cat")
    run = prepared(root, "training.batch_size=5", "training.micro_batch_size=2", data="sizes")
    assert len({row.bucket for row in run.split.train}) == 3
    with opened_loop(run, tmp_path) as loop:
        seen: list[Any] = []
        collate = run.train.batch
        loop.train.batch = lambda *given: seen.append(collate(*given)) or seen[-1]  # type: ignore[method-assign]
        (step,) = loop.plan(0)
        assert len(step) > 1
        loop._forward_backward(step)
        found = {name: p.grad.double() for name, p in loop.model.named_parameters() if p.grad is not None}
        loop.model.zero_grad()
        model = loop.model.double()
        total: Any = 0.0
        for batch in seen:
            for group in batch.groups:
                for at in range(len(group.places)):
                    inputs = {name: value[at : at + 1].double() for name, value in group.inputs.items()}
                    sample = model(**inputs).sample
                    total = total + (sample - group.target[at : at + 1].double()).square().mean() / 5
        total.backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 2e-3 * expected[name].norm() + 1e-9, name
    assert sum(float(gradient.norm()) for gradient in found.values()) > 0


REFUSED = {
    "sd15": [
        (["method.layers=[0]"], "'method.layers' counts the layers of a language model"),
        (["method.target=text_encoder"], "'text_encoder', which is adapted with training.text_encoder=true alone"),
        (["method={kind: peft, type: PREFIX_TUNING, options: {num_virtual_tokens: 2}}"], "a denoiser reads none"),
        (["method={kind: head}"], "'head' is for classifiers"),
        (["optimizer.text_encoder_lr=0.1"], "needs training.text_encoder=true"),
    ],
    "flux": [(["noise.min_snr_gamma=5"], "'noise.min_snr_gamma' .* trained by flow matching; leave it out")],
}


@pytest.mark.parametrize("base", REFUSED)
def test_what_does_not_suit_pictures_is_a_sentence(root: Path, base: str) -> None:
    if base == "flux":
        saved(flux1(), root / "flux")
    for overrides, said in REFUSED[base]:
        with pytest.raises(HaoriError, match=said):
            prepared(root, *overrides, base=base)


@pytest.mark.parametrize(
    ("overrides", "lr", "scale"),
    [
        ([], 1e-3, 1.0),
        (["method={kind: full}"], 1e-4, None),
        (["method={kind: adalora, target: attention}"], 1e-2, 1.0),
        (["method={kind: lora, lr_ratio: 16}"], 2.5e-4, 1.0),
        (["method={kind: lora, rslora: true, rank: 9}"], 1e-3, 1.0),
        (["method={kind: peft, type: LOKR}"], 1e-2, None),
        (["preset=character"], 1e-3, 0.5),
    ],
)
def test_rate_and_scale_suit_the_method(root: Path, overrides: list[str], lr: float, scale: float | None) -> None:
    document = {"name": "x", "task": "text_to_image", "base": str(root / "sd15"), "data": {"path": str(root / "data")}}
    run = prepare(recipe_from(document, ["data.resolution=32", "training.epochs=20", *overrides]))
    assert run.recipe.optimizer.lr == pytest.approx(lr)
    method: Any = run.recipe.method
    if scale is not None:
        divisor = {"adalora": getattr(method, "initial_rank", 0)}.get(method.kind, method.rank)
        divisor = divisor**0.5 if getattr(method, "rslora", False) else divisor
        assert method.alpha / divisor == pytest.approx(scale, rel=1e-3)
        assert any(c.key == "method.alpha" and f"scale {scale:g} " in c.reason for c in run.choices)


def test_a_full_fine_tuning_of_text_encoders_too_is_a_pipeline_of_its_own(root: Path, tmp_path: Path) -> None:
    """SDXL's UNet and both encoders, at two rates: proved, resumed bit for bit, and read by the stock pipeline."""
    saved(stable_diffusion_xl(), root / "sdxl")
    run = prepared(root, "method={kind: full}", "training.text_encoder=true", "optimizer.lr=0.004",
                   "optimizer.text_encoder_lr=0.001", "training.epochs=1", base="sdxl")  # fmt: skip
    (tmp_path / "whole").mkdir()
    trained = train_prepared(run, tmp_path / "whole", None, "2026-01-01T00:00:00+00:00", discard)
    assert prove_model(run, tmp_path / "whole", trained.live, discard).passed
    first = sorted((tmp_path / "whole" / "checkpoints").iterdir())[0]
    shutil.copytree(first, tmp_path / "again" / "checkpoints" / first.name)
    train_prepared(run, tmp_path / "again", first, "2026-01-01T00:00:00+00:00", discard)
    before, after = stock_xl(root / "sdxl"), stock_xl(tmp_path / "whole" / "model")
    again = stock_xl(tmp_path / "again" / "model")
    steps = {}
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        weights = dict(getattr(before, part).named_parameters())
        moved = [float((weight - weights[name]).detach().abs().max())
                 for name, weight in getattr(after, part).named_parameters()]  # fmt: skip
        steps[part] = max(moved)
        assert all(map(torch.equal, getattr(after, part).parameters(), getattr(again, part).parameters()))
    assert steps["vae"] == 0 < steps["text_encoder"]
    # AdamW moves a weight by its rate at most in each of the first steps.
    assert steps["text_encoder"] == pytest.approx(steps["text_encoder_2"], rel=0.2)
    assert steps["unet"] == pytest.approx(4 * steps["text_encoder"], rel=0.2)
    assert trained.live is not None
    theirs = torch.cat([noise_xl(after, probe) for probe in trained.live.probes])
    assert (theirs - torch.cat(trained.live.logits)).norm() < 1e-4 * theirs.norm()
    bare = torch.cat([noise_xl(before, probe) for probe in trained.live.probes])
    assert (theirs - bare).norm() > 1e-2 * theirs.norm()


def stock_xl(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def noise_xl(pipe: Any, probe: Any) -> torch.Tensor:
    """Return the prediction of a stock pipeline's parts, from tokens on."""
    first = pipe.text_encoder(probe["tokens_text_encoder"], output_hidden_states=True)
    second = pipe.text_encoder_2(probe["tokens_text_encoder_2"], output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    added = {"text_embeds": second[0], "time_ids": probe["time_ids"]}
    return pipe.unet(probe["noisy"], probe["timesteps"], states, added_cond_kwargs=added).sample.reshape(-1, 1)
