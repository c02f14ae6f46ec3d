"""Does an adapter fit a base: real tiny models that differ in weights, depth and width."""

from pathlib import Path

import pytest

from haori.bases import add_base, find_base
from haori.core.records import BaseReference
from haori.library import Library, check_compatibility
from tests.command_line import haori
from tests.conftest import build_tiny_base
from tests.library_samples import card_of, written_adapter

Q = "model.model.layers.0.self_attn.q_proj"


def narrow_base(folder: Path, tiny: Path) -> Path:
    """A Llama of the same depth with D 32 in place of 64."""
    import shutil

    from transformers import AutoConfig, LlamaForCausalLM

    shutil.copytree(tiny, folder)
    config = AutoConfig.from_pretrained(tiny)
    config.hidden_size, config.head_dim = 32, 32 // config.num_attention_heads
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_base_folder) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "own": tiny_base_folder,
        "tuned": build_tiny_base(root / "tuned", seed=9),
        "deep": build_tiny_base(root / "deep", layers=3),
        "narrow": narrow_base(root / "narrow", tiny_base_folder),
    }


@pytest.fixture
def stored(tmp_path, haori_home, bases):
    folder = written_adapter(tmp_path / "a")
    return Library().add(folder, "a", card_of(folder, find_base(str(bases["own"])).reference()))


def test_yes_is_for_the_same_weights_only(stored, bases):
    assert check_compatibility(stored, find_base(str(bases["own"]))).answer == "yes"
    tuned = check_compatibility(stored, find_base(str(bases["tuned"])))
    assert tuned.answer == "structure only"
    assert "other weights of the same structure" in tuned.reasons[0]


def test_another_structure_in_which_every_module_has_its_place(stored, bases):
    deep = check_compatibility(stored, find_base(str(bases["deep"])))
    assert (deep.answer, deep.misfits) == ("structure only", ())
    assert "another structure" in deep.reasons[0]
    assert "All 1 modules" in deep.reasons[1]


def test_no_says_which_module_and_both_shapes(stored, bases):
    narrow = check_compatibility(stored, find_base(str(bases["narrow"])))
    assert narrow.answer == "no"
    assert [(misfit.module, misfit.update, misfit.base) for misfit in narrow.misfits] == [(Q, (64, 64), (32, 32))]


def test_a_module_that_is_not_there_is_named(tmp_path, haori_home, bases):
    from safetensors.numpy import load_file, save_file

    folder = written_adapter(tmp_path / "b")
    weights = folder / "adapter_model.safetensors"
    save_file({key.replace("layers.0", "layers.2"): value for key, value in load_file(weights).items()}, weights)
    deep = find_base(str(bases["deep"]))
    stored = Library().add(folder, "b", card_of(folder, deep.reference()))
    assert check_compatibility(stored, deep).answer == "yes"
    own = check_compatibility(stored, find_base(str(bases["own"])))
    assert own.answer == "no"
    assert [misfit.base for misfit in own.misfits] == [None]
    assert "layers.2.self_attn.q_proj" in str(own.misfits[0])


def test_a_tensor_that_replaces_one_of_the_base_has_to_have_its_shape(tmp_path, haori_home, bases):
    from tests.library_samples import change_tensors, stock_lora

    folder = stock_lora(bases["own"], tmp_path / "c", modules_to_save=["lm_head"])
    deep = find_base(str(bases["deep"]))
    fitting = Library().add(folder, "c", card_of(folder, find_base(str(bases["own"])).reference()))
    assert check_compatibility(fitting, deep).answer == "structure only"

    def widen(tensors):
        key = next(key for key in tensors if "lm_head" in key)
        tensors[key] = tensors[key].repeat(2, 1)

    change_tensors(folder, widen)
    wide = Library().add(folder, "wide", card_of(folder, find_base(str(bases["own"])).reference()))
    found = check_compatibility(wide, deep)
    assert found.answer == "no"
    assert "lm_head" in found.misfits[0].module


def test_of_a_family_alone_nothing_is_yes(stored, bases):
    family = BaseReference(name="llama", source="family:llama", components={}, family="llama")
    from dataclasses import replace

    of_family = replace(stored, card=stored.card.with_fields(base=family))
    assert check_compatibility(of_family, find_base(str(bases["own"]))).answer == "structure only"
    assert check_compatibility(of_family, find_base(str(bases["narrow"]))).answer == "no"


def test_what_cannot_be_compared_module_by_module_is_no(tmp_path, haori_home, bases):
    from peft import IA3Config

    from tests.library_samples import save_stock, stock_model

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    folder = save_stock(stock_model(bases["own"], config), tmp_path / "ia3")
    stored = Library().add(folder, "ia3", card_of(folder, find_base(str(bases["own"])).reference()))
    assert check_compatibility(stored, find_base(str(bases["tuned"]))).answer == "structure only"
    assert check_compatibility(stored, find_base(str(bases["narrow"]))).answer == "no"


def test_the_command_answers_by_its_exit_code(capsys, stored, bases):
    assert haori(capsys, "library", "check", "a").code == 0
    done = haori(capsys, "library", "check", "a", "--base", bases["own"], "--base", bases["narrow"])
    assert done.code == 1
    assert "yes" in done.out
    assert "32 x 32" in done.out
    assert haori(capsys, "library", "check", "a", "--base", bases["tuned"]).code == 1
    assert haori(capsys, "library", "check", "a", "--base", "nowhere").code == 2
    assert haori(capsys, "library", "check", "a", "--base", bases["own"], "--all").code == 2
    assert haori(capsys, "library", "check", "a", "--all").code == 1  # only what comes with the package is installed


def test_all_installed_bases_make_a_matrix(capsys, stored, bases):
    import shutil

    gone = build_tiny_base(bases["deep"].parent / "gone", seed=3)
    for name, path in {**bases, "gone": gone}.items():
        add_base(str(path), name=name)
    shutil.rmtree(gone)
    done = haori(capsys, "library", "check", "a", "--all")
    rows = [[cell.strip() for cell in line.split("│")] for line in done.out.splitlines() if "a@1" in line]
    answers = {row[2]: row[3] for row in rows}
    assert answers == {
        "own": "yes",
        "tuned": "structure only",
        "deep": "structure only",
        "narrow": "no",
        "gone": "unknown",
        "emoji-sd": "no",
    }
    assert done.code == 0
