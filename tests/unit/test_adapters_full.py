"""Full fine-tuning: what is trained and in which format, its checkpoints, and the folder that is proved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from haori.adapters.insertion import Insertion
from haori.adapters.loading import loading_of
from haori.adapters.methods import behaviour_of, insert_method
from haori.bases import find_base
from haori.core.errors import FileFormatError, InputError, VerificationError
from haori.core.methods import FullMethod
from haori.library import live_probe_logits, verify_model
from haori.tasks.recipe import Recipe, recipe_from
from haori.training.auto import resolve
from haori.training.whole_model import load_parameters, save_model_folder, save_parameters
from tests.conftest import build_tiny_base

PROBES = [[5, 6, 7, 8], [9, 10, 11]]


def recipe(*overrides: str) -> Recipe:
    document = {"name": "t", "base": "b", "data": {"path": "p"}, "method": {"kind": "full"}}
    return recipe_from(document, overrides)


def resolved(*overrides: str) -> Recipe:
    return resolve(recipe(*overrides), 100, 135_000_000, ("bf16", "fast here"))[0]


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_every_weight_is_trained_in_one_group(tiny_base_folder: Path):
    method = resolved().method
    model = load(tiny_base_folder).requires_grad_(False)
    trained = insert_method(model, AutoTokenizer.from_pretrained(tiny_base_folder), method, (), Insertion(0, 10))
    assert trained is model
    assert all(parameter.requires_grad for parameter in trained.parameters())
    (group,) = behaviour_of(trained, method, 10).parameter_groups(0.1)
    assert sum(p.numel() for p in group["params"]) == find_base(str(tiny_base_folder)).parameters
    assert (group["weight_decay"], group["rate"]) == (0.1, 1.0)


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        ((), "fp32"),
        (("training.dtype=bf16",), "bf16"),
        (("training.dtype=fp32",), "fp32"),
        (("training.dtype=bf16", "method.weights=fp32"), "fp32"),
    ],
)
def test_weights_are_fp32_unless_bf16_was_asked_for(overrides: tuple[str, ...], weights: str):
    found = resolved(*overrides)
    assert isinstance(found.method, FullMethod)
    assert found.method.weights == weights
    assert loading_of(found.method, found.training.dtype) == (weights, None)
    # A resumed run reads the resolved recipe, whose dtype is no longer `auto`.
    again = recipe_from(found.model_dump(mode="json"))
    assert resolved(*[f"method.weights={again.method.weights}", f"training.dtype={again.training.dtype}"]) == found


def test_learning_rate_is_a_tenth_and_unresolved_weights_are_refused():
    assert resolved().optimizer.lr == 5e-5
    with pytest.raises(InputError, match="must be fp32 or bf16"):
        loading_of(recipe().method, "bf16")


def test_a_checkpoint_holds_every_weight_once_and_restores_it(tiny_base_folder: Path, tmp_path: Path):
    model = load(tiny_base_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save_parameters(model, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {name for name, _ in model.named_parameters()}
    other = load(tiny_base_folder)
    load_parameters(tmp_path, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_unusable_checkpoints_are_refused(tiny_base_folder: Path, tmp_path: Path):
    model = load(tiny_base_folder)
    with pytest.raises(FileFormatError, match=r"has no model\.safetensors"):
        load_parameters(tmp_path, model)
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(FileFormatError, match="another base"):
        load_parameters(tmp_path, model)
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(VerificationError, match=r"'model\.norm\.weight' holds values that are not finite"):
        save_parameters(model, tmp_path)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path, list[torch.Tensor]]:
    """A base, a changed model of it saved as a folder, and its live logits."""
    base = build_tiny_base(tmp_path / "base")
    model = load(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    folder = tmp_path / "model"
    folder.mkdir()
    save_model_folder(model, AutoTokenizer.from_pretrained(base), find_base(str(base)), "Apache-2.0", folder)
    return base, folder, live_probe_logits(model, PROBES)


def failures(base: Path, folder: Path, live: list[torch.Tensor]) -> set[str]:
    found = verify_model(find_base(str(base)), folder, dtype="fp32", device="cpu", probes=PROBES, live_logits=live)
    assert found.passed == (not found.failures)
    return {check.name for check in found.failures}


def test_the_proof_passes_for_what_was_trained(trained):
    base, folder, live = trained
    assert failures(base, folder, live) == set()
    made = find_base(str(folder))
    assert made.licence == "Apache-2.0"
    assert made.fingerprint.chat_template == find_base(str(base)).fingerprint.chat_template


def test_the_proof_finds_each_fault(trained):
    base, folder, live = trained
    assert failures(folder, folder, live) == {"effect"}  # nothing was trained
    assert failures(base, folder, [logits + 0.01 for logits in live]) == {"reload"}
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert {"finite", "effect"} <= failures(base, folder, live)
    (folder / "model.safetensors").write_bytes(b"short")
    assert failures(base, folder, live) == {"files"}
