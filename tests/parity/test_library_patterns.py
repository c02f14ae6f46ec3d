"""Rank and alpha patterns whose keys overlap: stock PEFT is the measure, in the order of the file."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.adapters.patterns import clash_of, exact_patterns
from haori.bases import find_base
from haori.core.errors import InputError, VerificationError
from haori.library import Library, adapter_id, export_stored, import_adapter, inspect_adapter
from tests.command_line import haori as haori_command
from tests.library_samples import card_of, stock_logits, stock_lora, written_adapter

OVERLAPPING = {"q_proj": 64, "layers.1.self_attn.q_proj": 2, ".*proj": 16}  # sorted, another key comes first


@pytest.fixture
def overlapping(tiny_base_folder: Path, tmp_path: Path) -> Path:
    folder = stock_lora(tiny_base_folder, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": OVERLAPPING}))
    return folder


def sorted_copy(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config, sort_keys=True))
    return out


def far(first: list[Any], second: list[Any]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def test_export_keeps_what_the_order_of_the_file_means(tiny_base_folder, tmp_path, overlapping):
    expected = stock_logits(tiny_base_folder, overlapping)
    assert far(stock_logits(tiny_base_folder, sorted_copy(overlapping, tmp_path / "sorted")), expected) > 0.01
    import_adapter(overlapping, find_base(str(tiny_base_folder)), name="mixed", dtype="fp32")
    out = export_stored("mixed", tmp_path / "out", base_spec=str(tiny_base_folder))
    assert far(stock_logits(tiny_base_folder, out), expected) < 1e-6
    # Whoever saves it again, sorted, keeps what it does.
    assert far(stock_logits(tiny_base_folder, sorted_copy(out, tmp_path / "again")), expected) < 1e-6
    assert inspect_adapter(overlapping).ordered_patterns == ("alpha_pattern",)
    assert inspect_adapter(out).ordered_patterns == ()


def test_the_id_covers_what_the_order_means(tmp_path, tiny_base_folder, overlapping):
    one, other = inspect_adapter(overlapping), inspect_adapter(sorted_copy(overlapping, tmp_path / "sorted"))
    assert adapter_id(one) != adapter_id(other)
    # Where order means nothing it does not count.
    orders: list[dict[str, int]] = [{"q_proj": 4, "k": 2}, {"k": 2, "q_proj": 4}]
    made = [written_adapter(tmp_path / str(n), rank_pattern=pattern) for n, pattern in enumerate(orders)]
    assert len({adapter_id(inspect_adapter(folder)) for folder in made}) == 1
    assert adapter_id(inspect_adapter(written_adapter(tmp_path / "x"))) != adapter_id(
        inspect_adapter(written_adapter(tmp_path / "y", lora_alpha=0))
    )


def test_ids_of_before_are_still_theirs(tmp_path, overlapping, monkeypatch):
    from haori.library import cards

    library = Library(tmp_path / "library")
    files = inspect_adapter(overlapping)
    old = cards._id(files, {})
    assert old != adapter_id(files)
    stored = library.add(overlapping, "old", card_of(overlapping))
    place = library.folder(old)
    place.parent.mkdir(parents=True, exist_ok=True)
    stored.path.rename(place)
    (place / "card.json").write_text(stored.card.with_fields(id=old).model_dump_json())
    assert library.rebuild() == (1, ())


@pytest.mark.parametrize("spoil", ["alpha", "module", "half", "tenth"])
def test_a_wrong_export_is_found(tiny_base_folder, tmp_path, monkeypatch, spoil):
    from haori.library import formats

    folder = stock_lora(tiny_base_folder, tmp_path / "a")
    import_adapter(folder, find_base(str(tiny_base_folder)), name="x", dtype="fp32")
    real = formats.peft.copy_adapter

    def copy(source: Path, target: Path) -> None:
        from safetensors.torch import load_file, save_file

        real(source, target)
        path = target / "adapter_config.json"
        config = json.loads(path.read_text())
        if spoil in ("alpha", "tenth"):
            config["lora_alpha"] *= 0.9 if spoil == "alpha" else 0.99
        path.write_text(json.dumps(config))
        tensors = load_file(target / "adapter_model.safetensors")
        key = next(key for key in tensors if "layers.1" in key and "lora_B" in key)
        if spoil in ("module", "half"):
            tensors[key] = tensors[key] * (0.5 if spoil == "half" else 0.0)
        save_file(tensors, target / "adapter_model.safetensors")

    monkeypatch.setattr(formats.peft, "copy_adapter", copy)
    with pytest.raises(VerificationError, match=r"was not exported.*differs from what is stored"):
        export_stored("x", tmp_path / "out", base_spec=str(tiny_base_folder))
    assert not (tmp_path / "out").exists()


def test_the_command_proves_what_it_exports(tiny_base_folder, tmp_path, capsys, overlapping):
    import_adapter(overlapping, find_base(str(tiny_base_folder)), name="mixed")
    done = haori_command(capsys, "library", "export", "mixed", "--out", tmp_path / "out")
    assert done.code == 0 and "Written to" in done.out
    assert haori_command(capsys, "library", "export", "mixed", "--out", tmp_path / "out").code == 2


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_ambiguous_patterns_are_refused_before_training(tiny_base_folder, tiny_tokenizer, key):
    from transformers import AutoModelForCausalLM

    from haori.adapters.low_rank import check_low_rank
    from haori.core.methods import LoraMethod

    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    targets = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    method = LoraMethod(**{key: {"q_proj": 4, "layers.1.self_attn.q_proj": 2}})
    with pytest.raises(InputError, match=rf"'q_proj' and 'layers.1.self_attn.q_proj' of method.{key} both"):
        check_low_rank(model, tiny_tokenizer, method, targets)
    check_low_rank(model, tiny_tokenizer, LoraMethod(**{key: {"q_proj": 4, "layers.1.self_attn.q_proj": 4}}), targets)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR"])
def test_the_same_for_other_methods_of_peft(tiny_base_folder, tiny_tokenizer, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    from haori.adapters.insertion import Insertion
    from haori.adapters.methods import insert_method
    from haori.core.methods import PeftMethod

    targets = [f"model.layers.{n}.mlp.{m}_proj" for n in (0, 1) for m in ("up", "down")]

    def insert(pattern: dict[str, Any]) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
        method = PeftMethod(kind="peft", type=kind, options={"r": 4, "alpha_pattern": pattern}, target=tuple(targets))
        return insert_method(model, tiny_tokenizer, method, targets, Insertion(0, 1, []))

    with pytest.raises(InputError, match=r"of method.options.alpha_pattern both fit"):
        insert({"up_proj": 3, "layers.0.mlp.up_proj": 5})
    with pytest.raises(InputError, match=r"method.options.alpha_pattern is not a valid regular expression"):
        insert({"(": 5})
    with pytest.raises(InputError, match=r"'q_proj' of method.options.alpha_pattern fits none"):
        insert({"up_proj": 3, "q_proj": 5})
    config = insert({"up_proj": 3}).peft_config["default"]
    assert config.alpha_pattern == {targets[0]: 3, targets[2]: 3}


NAMES = [f"model.layers.{n}.{m}" for n in (0, 1, 10, 11) for m in ("attn.q", "attn.k", "mlp.q")] + ["q", "head.q"]
KEYS = [
    "q", "attn.q", "k", "layers.1.attn.q", "layers.1..attn.q", ".*", "mlp.q|attn.k", "^model.*q", "1.mlp.q", "nothing",
    *NAMES[:4],
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), st.integers(1, 3), max_size=5))
def test_exact_patterns_are_peft_s_reading_in_any_order(pattern):
    from peft.utils.other import get_pattern_key

    def reading(table: dict[str, int]) -> dict[str, int | None]:
        return {name: table.get(get_pattern_key(list(table), name)) for name in NAMES}

    exact = exact_patterns(pattern, NAMES)
    for order in (list(exact), sorted(exact), sorted(exact, reverse=True)):
        assert reading({key: exact[key] for key in order}) == reading(pattern)
    assert clash_of(exact, NAMES) is None
    in_every_order = {json.dumps(reading(dict(sorted(pattern.items(), reverse=r)))) for r in (False, True)}
    in_every_order.add(json.dumps(reading(pattern)))
    if len(in_every_order) > 1:
        assert clash_of(pattern, NAMES) is not None
    for key in exact:
        assert sum(bool(re.match(rf"(.*\.)?({key})$", name)) for name in NAMES) == 1


def test_patterns_are_saved_by_full_names(tiny_base_folder, tiny_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    from haori.adapters.insertion import Insertion
    from haori.adapters.methods import insert_method
    from haori.core.methods import LoraMethod

    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    targets = [f"model.layers.{n}.self_attn.{m}_proj" for n in (0, 1) for m in "qv"]
    method = LoraMethod(rank=4, alpha=8.0, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        insert_method(model, tiny_tokenizer, method, targets, Insertion(0, 1, [])).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {targets[2]: 2}
    assert config["alpha_pattern"] == {targets[1]: 3.0, targets[3]: 3.0}
    ranks = inspect_adapter(tmp_path / "a").ranks
    assert ranks == {targets[0]: 4, targets[1]: 4, targets[2]: 2, targets[3]: 4}
