"""Values of a configuration: what no adapter can have is refused with a sentence of ours, on every way in."""

import json
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haori.bases import find_base
from haori.core.errors import FileFormatError
from haori.library import import_adapter, inspect_adapter, verify_adapter
from tests.library_samples import change_tensors, stock_lora, written_adapter

# As JSON has them: 1e999 is read as infinity, NaN as itself.
NO_RANKS = ["1e999", "-1e999", "NaN", "8.0", "8.5", '"8"', "-8", "0", "true", "null", "[8]", "65537", "1" + "0" * 400]
NO_ALPHAS = ["1e999", "NaN", '"16"', "-16", "true", "null", "[16]", "1e30", "1" + "0" * 400]


def changed(folder, field, text):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config[field] = "HERE"
    path.write_text(json.dumps(config).replace('"HERE"', text))
    return folder


@pytest.mark.parametrize(
    ("field", "texts", "said"),
    [
        ("r", NO_RANKS, "sets 'r' to .*; it must be a whole number from 1 to 65,536, such as 8"),
        ("lora_alpha", NO_ALPHAS, "sets 'lora_alpha' to .*; it must be a number from 0 to 1,000,000"),
        ("rank_pattern", [f'{{"q_proj": {text}}}' for text in NO_RANKS], "'rank_pattern' for 'q_proj' to .*whole"),
        ("alpha_pattern", [f'{{"q_proj": {text}}}' for text in NO_ALPHAS], "'alpha_pattern' for 'q_proj' to .*number"),
        ("rank_pattern", ["[]", "3", '"x"'], "'rank_pattern' to .*table"),
        ("alpha_pattern", ["[8]", "true"], "'alpha_pattern' to .*table"),
        ("rank_pattern", ['{"(": 4}', '{"*q": 4}'], "as a regular expression, which it is not"),
        ("target_modules", ['"(q"', '"*"'], "as a regular expression, which it is not"),
        ("target_modules", ["3", "[3]", '{"q_proj": 1}'], "'target_modules' to .*list of module names"),
        ("modules_to_save", ['"norm"', "[1]", "true"], "'modules_to_save' to .*list of module names"),
        ("layers_to_transform", ['"0"', "[0.0]", "[-1]", "true", '["0"]'], "list of layer numbers"),
        ("modules_to_save", ['["("]'], "as a regular expression"),
        ("layers_pattern", ['"layers"', '["h"]'], "sets 'layers_pattern' without 'layers_to_transform'"),
        ("use_rslora", ['"false"', "1"], "'use_rslora' to .*true or false"),
        ("use_dora", ['"yes"'], "'use_dora' to 'yes'; it must be true or false"),
    ],
)
def test_values_that_no_adapter_can_have(tmp_path, field, texts, said):
    for number, text in enumerate(texts):
        folder = changed(written_adapter(tmp_path / f"{number}"), field, text)
        with pytest.raises(FileFormatError, match=said) as caught:
            inspect_adapter(folder)
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_what_peft_does_not_allow_together(tmp_path):
    for number, fields in enumerate(({"layers_to_transform": [0]}, {"layers_pattern": "layers"})):
        with pytest.raises(FileFormatError, match="beside a regular expression"):
            inspect_adapter(written_adapter(tmp_path / f"{number}", target_modules=".*q_proj", **fields))
    with pytest.raises(FileFormatError, match="which PEFT does not allow together"):
        inspect_adapter(written_adapter(tmp_path / "both", use_dora=True, lora_bias=True))


def test_values_of_other_methods(tmp_path):
    adalora = written_adapter(tmp_path / "a", peft_type="ADALORA", init_r=4)
    for field, text in (("init_r", "4.0"), ("init_r", '"4"'), ("rank_pattern", '{"x": 3}'), ("target_r", "-1")):
        with pytest.raises(FileFormatError, match=f"sets '{field}'.*it must be"):
            inspect_adapter(changed(written_adapter(tmp_path / f"{field}{text}", peft_type="ADALORA"), field, text))
    assert inspect_adapter(adalora).rank == 4
    for kind, fields in (("LOHA", {"r": 8.0}), ("LOKR", {"alpha": "16"}), ("OFT", {"r": -1}), ("VERA", {"r": True})):
        with pytest.raises(FileFormatError, match="it must be"):
            inspect_adapter(written_adapter(tmp_path / kind, peft_type=kind, lora_alpha=None, **fields))
    inspect_adapter(written_adapter(tmp_path / "oft0", peft_type="OFT", r=0, lora_alpha=None))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 3}, r"gives 'model.layers.0.self_attn.q_proj' the rank 3, and the shape \[4, 64\] of its lora_A.weight"),
        ({"rank_pattern": {"q_proj": 2}}, "the rank 2"),
        ({"rank_pattern": {r"layers\.0\..*": 5}}, "the rank 5"),
        ({"r": 60_000}, "the rank 60000"),
    ],
)
def test_ranks_that_the_file_does_not_have(tmp_path, options, said):
    with pytest.raises(FileFormatError, match=said):
        inspect_adapter(written_adapter(tmp_path / "a", **options))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"rank_pattern": {}}, {"rank_pattern": {"q_proj": 4}, "r": 2}, {"r": 4, "rank_pattern": {"v_proj": 2}},
        {"rank_pattern": {"model.layers.0.self_attn.q_proj": 4}, "r": 9}, {"alpha_pattern": {"q_proj": 0.5}},
        {"lora_alpha": 0}, {"lora_alpha": 12.5}, {"use_rslora": None}, {"target_modules": ".*q_proj"},
        {"layers_to_transform": [0]}, {"layers_to_transform": 0, "layers_pattern": "layers"}, {"layers_pattern": None},
        {"r": 2, "rank_pattern": {"self_attn.q_proj": 4, "q_proj": 3}},
    ],
)  # fmt: skip
def test_values_that_adapters_have(tmp_path, options):
    assert inspect_adapter(written_adapter(tmp_path / "a", **options)).rank == 4


@pytest.mark.parametrize(
    "options",
    [
        {"r": 5}, {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}},
        {"rank_pattern": {r"model\.layers\.0\..*": 3}, "alpha_pattern": {"v_proj": 1.5}}, {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["norm"], "use_rslora": True},
        {"lora_bias": False, "bias": "lora_only"}, {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"init_lora_weights": "olora"}, {"layer_replication": [[0, 2], [1, 2]]}, {"use_bdlora": None},
    ],
)  # fmt: skip
def test_what_stock_peft_saves_passes(tiny_base_folder, tmp_path, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert inspect_adapter(stock_lora(tiny_base_folder, tmp_path / "a", **options)).rank


def test_whole_numbers_are_no_factors(tmp_path):
    def change(tensors):
        for key, value in tensors.items():
            tensors[key] = value.int()

    folder = change_tensors(written_adapter(tmp_path / "a"), change)
    with pytest.raises(FileFormatError, match=r"lora_A\.weight' of dtype I32; save it as 16 or 32 bit floats"):
        inspect_adapter(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FIELDS = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "init_r", "use_dora",
          "modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules"]  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(FIELDS), value=JSON, kind=st.sampled_from(["LORA", "ADALORA", "ARD_LORA", "LOHA", "OFT"]))
def test_any_value_passes_or_gets_a_sentence(tmp_path, field, value, kind):
    folder = tmp_path / "a"
    if not folder.exists():
        written_adapter(folder)
    config = {"peft_type": kind, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], field: value}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        files = inspect_adapter(folder)
    except FileFormatError as error:
        assert "The adapter in" in str(error)
    else:
        assert files.rank == 4


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [("lora_alpha", '"16"', "'lora_alpha' to '16'"), ("r", "4.0", "'r' to 4.0"), ("r", "1e999", "'r' to inf")],
)
def test_adding_and_verifying_say_it_too(tiny_base_folder, tmp_path, field, text, said):
    base = find_base(str(tiny_base_folder))
    folder = changed(stock_lora(tiny_base_folder, tmp_path / "a"), field, text)
    with pytest.raises(FileFormatError, match=said):
        import_adapter(folder, base, name="a")
    failures = verify_adapter(base, folder, dtype="fp32").failures
    assert [check.name for check in failures] == ["files"] and said in failures[0].detail
