"""An adapter of a pipeline, exported and loaded by stock diffusers or stock PEFT, draws what it does on our model."""

from pathlib import Path
from typing import Any

import pytest

from haori.bases import find_base
from haori.core.errors import VerificationError
from haori.library import Library, export_in_format, export_stored, import_adapter
from tests.command_line import haori
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.picture_adapters import CONVOLUTIONS, TEXT, UNET, adapted, changed_tensors, drawn, saved_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return find_base(str(saved(stable_diffusion(), tmp_path_factory.mktemp("sd") / "tiny")))


def fresh(base: Any) -> Any:
    """Return the stock pipeline of a base, from its folder."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(base.path, safety_checker=None, local_files_only=True)


def drawn_live(base: Any, model: Any) -> Any:
    """Return what the stock pipeline draws with the live model's components in place of its own."""
    pipe, live = fresh(base), model.get_base_model()
    for name, module in live.named_children():
        setattr(pipe, name, module)
    return drawn(pipe)


def assert_same(found: Any, expected: Any, bare: Any) -> None:
    """A thousandth of the effect is allowed: fp32 sums in another order."""
    effect = (expected - bare).norm()
    assert effect > 0.05 * bare.norm()
    assert (found - expected).norm() < 1e-3 * effect


@pytest.mark.parametrize("wanted", ["kohya", "diffusers"])
def test_stock_diffusers_draws_the_same(base: Any, tmp_path: Path, wanted: str) -> None:
    live = adapted(base, f"{UNET}|{TEXT}|{CONVOLUTIONS}", alpha_pattern={"to_k": 2, "fc1": 5}, rank_pattern={"to_v": 2})
    import_adapter(saved_adapter(live, tmp_path / "a"), base, name="ours", dtype="fp32")
    pipe = fresh(base)
    bare = drawn(pipe)
    out = export_in_format("ours", tmp_path / "out.safetensors", wanted)
    pipe.load_lora_weights(str(out.parent), weight_name=out.name)
    assert_same(drawn(pipe), drawn_live(base, live), bare)


def weaker(tensors: dict[str, Any]) -> None:
    """The whole adapter at nine tenths: an alpha that is off by a tenth."""
    tensors |= {key: 0.9 * tensor for key, tensor in tensors.items() if "lora_B" in key}


def lost(tensors: dict[str, Any]) -> None:
    """One module of all."""
    key = next(key for key in tensors if "lora_B" in key and "to_out" in key)
    tensors[key] = 0 * tensors[key]


@pytest.mark.parametrize("fault", [weaker, lost])
def test_an_export_at_less_than_its_strength_is_refused(
    base: Any, tmp_path: Path, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer's fault is hidden from the comparison of files, so that only the stock pipeline can find it."""
    from safetensors.torch import load_file

    from haori.library import format_export
    from haori.library.formats import diffusers

    import_adapter(saved_adapter(adapted(base, UNET), tmp_path / "a"), base, name="ours", dtype="fp32")
    write = diffusers.write_hashed

    def wrong(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        tensors = dict(tensors)
        fault(tensors)
        write(path, tensors, metadata)

    monkeypatch.setattr(diffusers, "write_hashed", wrong)
    monkeypatch.setattr(format_export, "require_alike", lambda *_: None)
    with pytest.raises(VerificationError, match="predictions of the stock StableDiffusionPipeline differ"):
        export_in_format("ours", tmp_path / "out.safetensors", "diffusers")
    assert not (tmp_path / "out.safetensors").exists()
    monkeypatch.undo()
    assert load_file(export_in_format("ours", tmp_path / "out.safetensors", "diffusers"))


@pytest.mark.parametrize("fault", [weaker, lost])
def test_a_tenth_less_would_be_seen(base: Any, tmp_path: Path, fault: Any) -> None:
    live = adapted(base, UNET)
    import_adapter(changed_tensors(saved_adapter(live, tmp_path / "a"), fault), base, name="ours", dtype="fp32")
    pipe = fresh(base)
    bare = drawn(pipe)
    out = export_in_format("ours", tmp_path / "out.safetensors", "kohya")
    pipe.load_lora_weights(str(out.parent), weight_name=out.name)
    with pytest.raises(AssertionError):
        assert_same(drawn(pipe), drawn_live(base, live), bare)


def test_stock_peft_draws_the_same_from_a_folder_for_each_component(base: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    live = adapted(base, f"{UNET}|{TEXT}|{CONVOLUTIONS}", use_dora=True)
    import_adapter(saved_adapter(live, tmp_path / "a"), base, name="ours", dtype="fp32")
    out = export_stored("ours", tmp_path / "out")
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["text_encoder", "unet"]
    pipe = fresh(base)
    bare = drawn(pipe)
    PeftModel.from_pretrained(pipe.unet, out / "unet")
    PeftModel.from_pretrained(pipe.text_encoder, out / "text_encoder")
    assert 'PeftModel.from_pretrained(pipeline.unet, "path/to/this/folder/unet")' in (out / "README.md").read_text()
    assert_same(drawn(pipe), drawn_live(base, live), bare)
    again = import_adapter(out, base, name="again", dtype="fp32")
    assert again.card.components == ("text_encoder", "unet")
    import_adapter(out / "unet", base, name="half", dtype="fp32")
    assert Library().get("half").card.components == ("unet",)


def test_the_merged_pipeline_draws_the_same(base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import DiffusionPipeline

    live = adapted(base, f"{UNET}|{TEXT}|{CONVOLUTIONS}", use_dora=True)
    import_adapter(saved_adapter(live, tmp_path / "a"), base, name="ours", dtype="fp32")
    assert haori(capsys, "merge", "ours", "--out", tmp_path / "merged").code == 0
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None, local_files_only=True)
    assert_same(drawn(merged), drawn_live(base, live), drawn(fresh(base)))
