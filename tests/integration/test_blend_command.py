"""`haori blend` and `haori resize`: stored, proved, with parents, weights and licence; judged by stock PEFT."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from haori.bases import find_base
from haori.core.errors import MismatchError
from haori.core.records import Combination
from haori.library import Library, import_adapter
from tests.command_line import haori
from tests.conftest import build_tiny_base
from tests.library_samples import stock_lora


@pytest.fixture
def two(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """Two adapters of one base: other ranks, scales and target modules."""
    stock_lora(tiny_base_folder, tmp_path / "a", seed=1, r=4, lora_alpha=8)
    stock_lora(
        tiny_base_folder, tmp_path / "b", seed=2, r=2, lora_alpha=6, use_rslora=True,
        target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    base = find_base(str(tiny_base_folder))
    import_adapter(tmp_path / "a", base, name="a", licence="MIT")
    import_adapter(tmp_path / "b", base, name="b", licence="CC-BY-NC-4.0")
    return tiny_base_folder


def stock_deltas(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What stock PEFT adds to each weight."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return {
        name: module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_sum(base: Path, parts: dict[Path, float], result: Path, tolerance: float = 1e-5) -> None:
    found = stock_deltas(base, result)
    expected: dict[str, torch.Tensor] = {}
    for folder, weight in parts.items():
        for name, delta in stock_deltas(base, folder).items():
            expected[name] = expected.get(name, 0) + weight * delta
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((found[name] - delta).norm() / delta.norm()) < tolerance, name


def test_a_blend_is_stored_proved_and_exact(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = haori(capsys, "blend", "a:0.4", "b:-0.6", "--name", "ab")
    assert done.code == 0, done.err
    assert "ab@1 is in the library, rank 6" in done.out
    assert "the result is exact" in done.out
    library = Library()
    stored = library.get("ab")
    assert_sum(two, {tmp_path / "a": 0.4, tmp_path / "b": -0.6}, stored.path)
    card = stored.card
    ids = [library.get(name).card.id for name in ("a", "b")]
    assert card.parents == tuple(ids)
    assert card.origin == "combined"
    assert card.combination == Combination(kind="blend", weights={ids[0]: 0.4, ids[1]: -0.6})
    assert card.verification is not None and card.verification.passed
    assert "CC-BY-NC-4.0" in (card.licence or "")
    assert "MIT" in (card.licence or "")
    shown = haori(capsys, "library", "show", "ab").out
    assert "blend of 0.4" in shown
    assert "no:" in shown, "a parent's non-commercial licence decides"
    assert "blended" in haori(capsys, "library", "lineage", "ab").out


def test_one_adapter_at_weight_1_is_itself(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = haori(capsys, "blend", "a:1", "b:0", "--name", "same")
    assert done.code == 0, done.err
    assert Library().get("same").card.id == Library().get("a").card.id


def test_truncation_reports_its_energy(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = haori(capsys, "blend", "a:0.5", "b:0.5", "--name", "ab", "--rank", "3")
    assert done.code == 0, done.err
    made = Library().get("ab").card.combination
    assert made is not None
    total = kept = 0.0
    deltas = [stock_deltas(two, tmp_path / name) for name in ("a", "b")]
    for name in {*deltas[0], *deltas[1]}:
        s = torch.linalg.svdvals(sum(0.5 * of[name] for of in deltas if name in of)).square()
        kept, total = kept + float(s[:3].sum()), total + float(s.sum())
    assert made.energy == pytest.approx(kept / total, rel=1e-5)
    assert f"Energy kept: {kept / total:.2%} in all" in done.out
    assert made.energy_least < made.energy_median < 1


@pytest.mark.parametrize("method", ["ties", "dare-ties", "knots-ties"])
def test_other_methods_are_stored_too(two: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    done = haori(capsys, "blend", "a:1", "b:1", "--name", "ab", "--method", method, "--density", "0.4", "--seed", "3")
    assert done.code == 0, done.err
    made = Library().get("ab").card.combination
    assert made is not None
    assert (made.method, made.density, made.seed) == (method, 0.4, 3 if "dare" in method else None)


def test_dora_needs_a_rank(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock_lora(two, tmp_path / "d", seed=3, use_dora=True)
    import_adapter(tmp_path / "d", find_base(str(two)), name="d")
    done = haori(capsys, "blend", "a:0.5", "d:0.5", "--name", "ad")
    assert done.code == 2
    assert "'d@1' is a DoRA" in done.err
    assert "--rank" in done.err
    done = haori(capsys, "blend", "a:0.5", "d:0.5", "--name", "ad", "--rank", "48")
    assert done.code == 0, done.err
    made = Library().get("ad").card.combination
    assert made is not None
    assert 0.5 < made.energy < 1


def test_different_bases_are_refused_by_name(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = build_tiny_base(tmp_path / "other-base", seed=5)
    stock_lora(other, tmp_path / "c", seed=3)
    import_adapter(tmp_path / "c", find_base(str(other)), name="c")
    done = haori(capsys, "blend", "a:0.5", "c:0.5", "--name", "ac")
    assert done.code == 2
    assert two.name in done.err
    assert "'other-base'" in done.err
    assert "other weights" in done.err


@pytest.mark.parametrize(("arguments", "said"), [
    (["a:0.4", "zz:0.6", "--name", "x"], "no adapter 'zz'"),
    (["a:much", "--name", "x"], "is no model name"),
    (["a:0.4", "b:0.6", "--name", "x y"], "cannot be called"),
    (["a:0.4", "b:0.6", "--name", "x", "--method", "tie"], "did you mean 'ties'"),
    (["a:0", "b:0", "--name", "x"], "All weights are zero"),
])  # fmt: skip
def test_mistakes_are_sentences(two: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    done = haori(capsys, "blend", *arguments)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_resizing(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = haori(capsys, "resize", "a", "--rank", "2")
    assert done.code == 0, done.err
    library = Library()
    stored = library.get("a@2")
    assert stored.card.rank == 2
    assert stored.card.parents == (library.get("a@1").card.id,)
    found, whole = stock_deltas(two, stored.path), stock_deltas(two, tmp_path / "a")
    for name, delta in whole.items():
        u, s, vh = torch.linalg.svd(delta)
        nearest = (u[:, :2] * s[:2]) @ vh[:2]
        assert float((found[name] - nearest).norm() / nearest.norm()) < 1e-5
    done = haori(capsys, "resize", "a@1", "--rank", "4")
    assert done.code == 2
    assert "rank 4 at most already" in done.err


def test_a_copied_embedding_is_no_obstacle(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside an update of an embedding PEFT keeps the base's own weights."""
    stock_lora(two, tmp_path / "e", seed=4, target_modules=["embed_tokens", "q_proj"])
    keys = json.loads((tmp_path / "e" / "adapter_config.json").read_text())["target_modules"]
    assert "embed_tokens" in keys
    import_adapter(tmp_path / "e", find_base(str(two)), name="e")
    done = haori(capsys, "blend", "a:0.5", "e:0.25", "--name", "ae")
    assert done.code == 0, done.err
    assert_sum(two, {tmp_path / "a": 0.5, tmp_path / "e": 0.25}, Library().get("ae").path)


def test_adapters_of_a_quantised_base_are_blended_without_its_weights(two: Path, tmp_path: Path) -> None:
    """Of GPTQ and its kin the files have no weights by the modules' names; only a DoRA needs them."""
    from haori.library.combining.blending import Part
    from haori.library.combining.stored import _weight_of
    from haori.library.formats.registry import read_updates

    folder = tmp_path / "quantised"
    shutil.copytree(two, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    updates = read_updates(tmp_path / "a")
    weight_of = _weight_of(find_base(str(folder)), [Part("a", updates, 0.5)])
    assert weight_of is not None
    with pytest.raises(MismatchError, match="16-bit model"):
        weight_of(next(iter(updates.modules)))
