"""Adapters for images, genuine files of kohya and LyCORIS, blended, resized and merged as their trainers have them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from haori.core.safetensors_header import read_safetensors_header
from haori.library import Library, import_adapter
from haori.library.formats.registry import read_updates
from tests.command_line import haori
from tests.pipeline_folders import write_pipeline

FILES = Path(__file__).parents[1] / "fixtures" / "image_adapters"


@pytest.fixture
def library() -> Library:
    files = {"lora": "kohya_sd15_r8_a4", "loha": "lycoris_sd15_loha_r4_a2", "dora": "lycoris_sd15_dora_r4_a4"}
    for name, file in files.items():
        import_adapter(FILES / f"{file}.safetensors", name=name)
    return Library()


def expected(file: str) -> dict[str, torch.Tensor]:
    """What the trainer says that some modules change, by the module's name in the neutral form."""
    return load_file(FILES / f"{file}.expected.safetensors")


def test_a_blend_of_two_kinds_is_the_sum_its_trainers_expect(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    done = haori(capsys, "blend", "lora:0.4", "loha:-0.5", "--name", "both")
    assert done.code == 0, done.err
    stored = library.get("both")
    assert stored.card.base.family == "sd15"
    assert stored.card.parents == (library.get("lora").card.id, library.get("loha").card.id)
    found = read_updates(stored.path).modules
    parts = [(0.4, "kohya_sd15_r8_a4"), (-0.5, "lycoris_sd15_loha_r4_a2")]
    read = [(weight, read_updates(FILES / f"{file}.safetensors").modules, expected(file)) for weight, file in parts]
    assert found.keys() == set().union(*(modules for _, modules, _ in read))
    compared = 0
    for name, update in found.items():
        total = torch.zeros((), dtype=torch.float64)
        for weight, modules, known in read:
            if name in modules:
                delta = known.get(f"{name}.weight")
                compared += delta is not None
                total = total + weight * (modules[name].delta() if delta is None else delta.double()).flatten()
        assert float((update.delta().flatten() - total).norm() / total.norm()) < 1e-5, name
    assert compared == 8, "all modules of which the trainers say what they change"


def test_a_blend_keeps_the_trigger_words_of_what_it_adds(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resized = haori(capsys, "resize", "lora", "--rank", "2", "--name", "other")
    assert resized.code == 0, resized.err
    library.update("other", trigger_words=("less",))
    library.update("lora", trigger_words=("sks cat", "purr"))
    library.update("loha", trigger_words=("purr", "zkz style"))
    done = haori(capsys, "blend", "lora:0.4", "loha:0.5", "other:-0.1", "--name", "both")
    assert done.code == 0, done.err
    assert library.get("both").card.trigger_words == ("sks cat", "purr", "zkz style")
    done = haori(capsys, "library", "export", "both", "--format", "kohya", "--out", tmp_path / "both.safetensors")
    assert done.code == 0, done.err
    header = read_safetensors_header(tmp_path / "both.safetensors").metadata
    assert header["modelspec.trigger_phrase"] == "sks cat, purr, zkz style"


def test_merging_into_a_pipeline(tmp_path: Path, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_pipeline(tmp_path / "painter", tiny_base_folder)
    numbers = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 4, 3, 3, generator=numbers), torch.randn(4, 2, 1, 1, generator=numbers)
    save_file({"unet.conv_in.lora.down.weight": a, "unet.conv_in.lora.up.weight": b}, tmp_path / "style.safetensors")
    import_adapter(tmp_path / "style.safetensors", name="style")
    done = haori(capsys, "merge", "style", "--base", base, "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(base / file), load_file(tmp_path / "merged" / file)
    dw = torch.einsum("or,rikl->oikl", b[:, :, 0, 0].double(), a.double())
    assert torch.equal(after["conv_in.weight"], (before["conv_in.weight"].double() + dw).float())
    assert torch.equal(after["conv_out.weight"], before["conv_out.weight"])


def test_resizing_and_dora(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    done = haori(capsys, "resize", "lora", "--rank", "2", "--name", "small")
    assert done.code == 0, done.err
    found, whole = read_updates(library.get("small").path).modules, read_updates(library.get("lora").path).modules
    for name, update in whole.items():
        u, s, vh = torch.linalg.svd(update.delta().flatten(1), full_matrices=False)
        nearest = (u[:, :2] * s[:2]) @ vh[:2]
        assert float((found[name].delta().flatten(1) - nearest).norm() / nearest.norm()) < 1e-5
    done = haori(capsys, "blend", "lora:0.5", "dora:0.5", "--name", "x", "--rank", "8")
    assert done.code == 2
    assert "only the family is known; give the base with --base" in done.err
