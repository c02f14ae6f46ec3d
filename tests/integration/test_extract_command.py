"""`haori extract`: the difference of two checkpoints as a LoRA, judged by a singular value decomposition of its own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from haori.bases import find_base
from haori.library import Library
from haori.library.combining.extracting import extract_updates
from tests.command_line import haori
from tests.conftest import build_tiny_base
from tests.diffusion_pipelines import saved, stable_diffusion

Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tuned_from(base: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def low_rank_change(tensors: dict[str, Tensor]) -> None:
    tensors[Q] += 0.05 * random(64, 3, seed=1) @ random(3, 64, seed=2)
    tensors[DOWN] -= 0.02 * random(64, 5, seed=3) @ random(5, 128, seed=4)


def deltas(before: Path, after: Path) -> dict[str, Tensor]:
    one, two = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    return {name: two[name].double() - one[name].double() for name in one}


def test_a_change_of_low_rank_is_found_whole(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tuned_from(tiny_base_folder, tmp_path / "tuned", low_rank_change)
    (tuned / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    done = haori(capsys, "extract", "--base", tiny_base_folder, "--tuned", tuned, "--rank", 8, "--name", "found")
    assert done.code == 0, done.err
    stored = Library().get("found")
    assert stored.card.origin == "added"
    made = stored.card.combination
    assert made is not None
    assert (made.kind, made.rank, made.left_out) == ("extract", 8, 0)
    assert made.tuned is not None and made.tuned.startswith("tuned (")
    assert made.energy > 1 - 1e-10
    assert (stored.path / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    tensors = load_file(stored.path / "adapter_model.safetensors")
    expected = deltas(tiny_base_folder, tuned)
    for name, rank in ((Q, 3), (DOWN, 5)):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        a, b = tensors.pop(key.format("A")), tensors.pop(key.format("B"))
        error = (b.double() @ a.double() - expected[name]).norm() / expected[name].norm()
        assert float(error) < 1e-6
        assert a.shape[0] >= rank
    assert not tensors, "nothing else differs"


def test_truncation_and_what_a_lora_cannot_represent(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[Q] += 0.01 * random(64, 64, seed=5)
        tensors["model.norm.weight"] += 0.1
        tensors["model.embed_tokens.weight"] += 0.001

    tuned = tuned_from(tiny_base_folder, tmp_path / "tuned", change)
    done = haori(capsys, "extract", "--base", tiny_base_folder, "--tuned", tuned, "--rank", 4, "--name", "found")
    assert done.code == 0, done.err
    s = torch.linalg.svdvals(deltas(tiny_base_folder, tuned)[Q]).square()
    share = float(s[:4].sum() / s.sum())
    assert f"{share:.2%} in all" in done.out
    assert "Left out: 2 tensors" in done.out
    assert "model.model.norm.weight" in done.out
    assert "model.model.embed_tokens.weight" in done.out
    made = Library().get("found").card.combination
    assert made is not None
    assert made.energy == pytest.approx(share, rel=1e-6)
    assert made.left_out == 2


def test_large_matrices_go_by_their_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    from haori.library.combining import factors

    for shape in ((40, 70), (70, 40)):
        matrix = random(*shape, seed=6).double() @ torch.diag(torch.logspace(0, -6, shape[1], dtype=torch.float64))
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        nearest = (u[:, :5] * s[:5]) @ vh[:5]
        monkeypatch.setattr(factors, "_SMALL", 1)
        b, a, energy = factors.low_rank(matrix, 5)
        assert float((b @ a - nearest).norm() / nearest.norm()) < 1e-7
        assert energy.share == pytest.approx(float(s[:5].square().sum() / s.square().sum()), rel=1e-9)


@pytest.mark.parametrize("kind", ["same", "another architecture", "only norms"])
def test_what_has_no_difference_is_refused(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "another architecture":
        tuned = build_tiny_base(tmp_path / "tuned", layers=1)
    else:

        def norms(tensors: dict[str, Tensor]) -> None:
            tensors["model.norm.weight"] += 0.0 if kind == "same" else 0.5

        tuned = tuned_from(tiny_base_folder, tmp_path / "tuned", norms)
    done = haori(capsys, "extract", "--base", tiny_base_folder, "--tuned", tuned, "--rank", 4, "--name", "found")
    assert done.code == 2
    said = "one architecture" if kind == "another architecture" else "differ in nothing that a LoRA can represent"
    assert said in done.err
    assert Library().list() == ()


def test_components_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(stable_diffusion(), tmp_path / "base")
    tuned = shutil.copytree(base, tmp_path / "tuned")
    file = "unet/diffusion_pytorch_model.safetensors"
    changed = load_file(tuned / file)
    for seed, name in enumerate(("conv_in.weight", "conv_out.weight")):
        changed[name] += 0.1 * random(*changed[name].shape, seed=seed)
    save_file(changed, tuned / file)
    found = extract_updates(find_base(str(base)), find_base(str(tuned)), 36)
    assert set(found.updates.modules) == {"unet.conv_in", "unet.conv_out"}
    one, two = load_file(base / file), load_file(tuned / file)
    for name, update in found.updates.modules.items():
        key = f"{name.removeprefix('unet.')}.weight"
        expected = two[key].double() - one[key].double()
        assert float((update.delta() - expected).norm() / expected.norm()) < 1e-6
    done = haori(capsys, "extract", "--base", base, "--tuned", tuned, "--rank", 36, "--name", "style")
    assert done.code == 0, done.err
    stored = Library().get("style")
    assert stored.card.components == ("unet",)
    assert stored.card.base.components.keys() == {"unet", "vae", "text_encoder"}
    done = haori(capsys, "merge", "style", "--base", base, "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    merged = load_file(tmp_path / "merged" / file)
    for name, weight in two.items():
        assert float((merged[name] - weight).abs().max()) < 1e-6
