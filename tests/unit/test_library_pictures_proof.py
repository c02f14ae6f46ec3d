"""The proof of an adapter of a pipeline: what is trained passes, and each lie about it is found."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from haori.bases import find_base
from haori.core.errors import MismatchError, VerificationError
from haori.core.records import Verification
from haori.library import (
    Library,
    export_in_format,
    import_adapter,
    live_probe_logits,
    require_passed,
    verify_adapter,
    verify_stored,
)
from haori.library.proof.noise import noise_probes
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.picture_adapters import CONVOLUTIONS, TEXT, UNET, adapted, changed_tensors, saved_adapter

BOTH = ("unet", "text_encoder")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return find_base(str(saved(stable_diffusion(), tmp_path_factory.mktemp("sd") / "tiny")))


@pytest.fixture(scope="module")
def live(base: Any) -> Any:
    return adapted(base, f"{UNET}|{TEXT}|{CONVOLUTIONS}")


@pytest.fixture(scope="module")
def good(live: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(live, tmp_path_factory.mktemp("adapter") / "good")


def named(verification: Verification) -> dict[str, Any]:
    return {check.name: check for check in verification.checks}


def test_what_was_trained_passes_every_check(base: Any, live: Any, good: Path) -> None:
    probes = noise_probes(base, BOTH)
    of_live = live_probe_logits(live, probes)
    found = verify_adapter(base, good, dtype="fp32", probes=probes, live_logits=of_live)
    require_passed(found)
    assert list(named(found)) == [
        "files", "finite", "keys", "delta of text_encoder", "delta of unet", "effect", "effect of text_encoder",
        "effect of unet", "reload", "merge", "prompt",
    ]  # fmt: skip
    assert named(found)["reload"].value == 0.0
    assert 0 < named(found)["merge"].value < 1e-10
    assert "noise predictions" in named(found)["effect"].detail
    with live.disable_adapter():
        bare = live_probe_logits(live, probes)
    weaker = [one - 0.1 * (one - other) for one, other in zip(of_live, bare, strict=True)]
    assert [c.name for c in verify_adapter(base, good, dtype="fp32", probes=probes, live_logits=weaker).failures] == [
        "reload"
    ]


def _zeroed(part: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors |= {key: 0 * tensor for key, tensor in tensors.items() if part in key and "lora_B" in key}

    return change


def _nan(tensors: dict[str, Any]) -> None:
    next(tensor for key, tensor in tensors.items() if "lora_A" in key)[0, 0] = float("nan")


def _renamed(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if "unet." in key]:
        tensors[key.replace("unet.", "transformer.")] = tensors.pop(key)


@pytest.mark.parametrize(
    ("lie", "failing"),
    [
        (_nan, {"finite"}),
        (_zeroed(""), {"delta of text_encoder", "delta of unet", "effect", "effect of text_encoder", "effect of unet",
                       "merge"}),
        (_zeroed("text_encoder"), {"delta of text_encoder", "effect of text_encoder"}),
        (_zeroed("unet"), {"delta of unet", "effect of unet"}),
        (_renamed, {"keys"}),
    ],
)  # fmt: skip
def test_lies_are_found(base: Any, good: Path, tmp_path: Path, lie: Any, failing: set[str]) -> None:
    folder = changed_tensors(Path(shutil.copytree(good, tmp_path / "a")), lie)
    assert {check.name for check in verify_adapter(base, folder, dtype="fp32").failures} == failing


def test_a_text_encoder_that_the_denoiser_does_not_hear_is_found(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    for name, layer in pipe.unet.named_modules():
        if name.endswith("attn2.to_v"):
            layer.weight.data.zero_()
    deaf = find_base(str(saved(pipe, tmp_path / "deaf")))
    folder = saved_adapter(adapted(deaf, f"{UNET.replace('v', 'q')}|{TEXT}"), tmp_path / "a")
    found = verify_adapter(deaf, folder, dtype="fp32")
    assert [check.name for check in found.failures] == ["effect of text_encoder"]
    assert "exactly what the base does" in named(found)["effect of text_encoder"].detail


def test_tokens_that_were_trained_are_in_the_probes(base: Any, tmp_path: Path) -> None:
    model = adapted(base, UNET, trainable_token_indices={"token_embedding": [5, 6]})
    folder = saved_adapter(model, tmp_path / "a")
    found = verify_adapter(base, folder, dtype="fp32")
    require_passed(found)
    assert named(found)["effect of text_encoder"].value > 0
    stored = import_adapter(folder, base, name="pivot", dtype="fp32")
    assert stored.card.components == ("text_encoder", "unet")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_merging_is_exact_whatever_the_dtype_and_the_sizes_of_the_probes(base: Any, good: Path, dtype: str) -> None:
    probes = noise_probes(base, BOTH)
    probes[0] = {**probes[0], "noisy": torch.cat([probes[0]["noisy"]] * 2, dim=3)}  # type: ignore[call-overload, index]
    for given in (None, probes):
        found = verify_adapter(base, good, dtype=dtype, probes=given)
        require_passed(found)
        assert named(found)["merge"].value < 1e-10


@pytest.mark.parametrize("method", ["dora", "loha", "lokr"])
def test_other_methods(base: Any, tmp_path: Path, method: str) -> None:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    config, options = {
        "dora": (LoraConfig, {"r": 4, "use_dora": True}),
        "loha": (LoHaConfig, {"r": 4, "alpha": 6}),
        "lokr": (LoKrConfig, {"r": 4, "alpha": 6}),
    }[method]
    folder = saved_adapter(adapted(base, f"{UNET}|{CONVOLUTIONS}", config=config, **options), tmp_path / "a")
    found = verify_adapter(base, folder, dtype="fp32")
    require_passed(found)
    assert list(named(found)) == ["files", "finite", "keys", "delta", "effect", "reload", "merge", "prompt"]


def test_another_base_is_refused(base: Any, good: Path, tmp_path: Path) -> None:
    pipe = stable_diffusion()
    pipe.unet.conv_in.weight.data += 0.1
    other = find_base(str(saved(pipe, tmp_path / "other")))
    import_adapter(good, base, name="ours", dtype="fp32")
    with pytest.raises(MismatchError, match="component 'unet'"):
        verify_stored(Library(), "ours", base_spec=str(other.path))
    wider = find_base(str(saved(stable_diffusion(block_out_channels=(16, 64)), tmp_path / "wider")))
    assert {check.name for check in verify_adapter(wider, good, dtype="fp32").failures} == {"keys"}


def test_a_file_of_another_trainer_is_run_on_its_base(base: Any, good: Path, tmp_path: Path) -> None:
    import_adapter(good, base, name="ours", dtype="fp32")
    export_in_format("ours", tmp_path / "style.safetensors", "kohya")
    stored = import_adapter(tmp_path / "style.safetensors", base, name="style")
    assert stored.card.format == "kohya" and stored.card.base.family == "sd15"
    names = ["keys", "finite", "delta", "family", "base", "effect", "effect of text_encoder", "effect of unet"]
    assert list(named(verify_stored(Library(), "style"))) == names
    ours = named(verify_stored(Library(), "ours"))
    theirs = named(verify_stored(Library(), "style"))
    for name in ("effect", "effect of unet", "effect of text_encoder"):
        assert theirs[name].value == pytest.approx(ours[name].value, rel=1e-5)


def test_a_file_whose_text_encoder_does_nothing_is_refused(base: Any, good: Path, tmp_path: Path) -> None:
    import_adapter(good, base, name="ours", dtype="fp32")
    path = export_in_format("ours", tmp_path / "style.safetensors", "kohya")
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file({key: 0 * t if "lora_te" in key and "up" in key else t for key, t in tensors.items()}, path)
    with pytest.raises(VerificationError, match="effect of text_encoder"):
        import_adapter(path, base, name="style")
