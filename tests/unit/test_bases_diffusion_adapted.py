"""PEFT on the model of a pipeline whose denoiser alone is loaded, and on one with its text encoder."""

from pathlib import Path

import pytest

from haori.bases import find_base, load_model
from tests.diffusion_pipelines import saved, stable_diffusion


@pytest.mark.parametrize("components", [("unet",), ("unet", "text_encoder")])
def test_no_hook_asks_for_gradients_of_what_is_frozen(tmp_path: Path, components: tuple[str, ...]) -> None:
    from peft import LoraConfig, get_peft_model

    base = find_base(str(saved(stable_diffusion(), tmp_path / "tiny")))
    model = load_model(base, dtype="fp32", components=components)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r"unet\..*\.to_q"))
    assert not [name for name, module in adapted.named_modules() if module._forward_hooks]
