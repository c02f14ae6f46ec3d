"""llama.cpp's GGUF LoRA against the files of its own converter, its table of names, and itself through a file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haori.core.errors import FileFormatError, InputError
from haori.library.formats.gguf import FORMAT
from haori.library.formats.gguf_names import FAMILIES
from haori.library.formats.registry import read_updates
from haori.library.updates import AdapterUpdates, ModuleUpdate

_FIXTURES = Path(__file__).parents[1] / "fixtures/formats/gguf"
_CONFIG = json.loads((_FIXTURES / "llama_config.json").read_text())
_Q, _K = "model.model.layers.0.self_attn.q_proj", "model.model.layers.3.self_attn.k_proj"


def lora(out, inputs, rank=4, alpha=None, **more):
    numbers = torch.Generator().manual_seed(out * 100 + inputs + rank)
    a, b = torch.randn(rank, inputs, generator=numbers), torch.randn(out, rank, generator=numbers)
    return ModuleUpdate("lora", {"A": a, "B": b}, alpha, **more)


def test_a_file_of_llama_cpp_is_what_peft_has():
    expected = read_updates(_FIXTURES / "llama_peft")
    found = read_updates(_FIXTURES / "llama_f32.gguf", _CONFIG)
    assert found.format == "gguf" and found.modules.keys() == expected.modules.keys() and len(found.modules) == 6
    for name, update in expected.modules.items():
        assert update.delta().abs().max() > 0.01
        assert torch.equal(found.modules[name].delta(), update.delta()), name
    packed = read_updates(_FIXTURES / "llama_q8_0.gguf", _CONFIG)
    for name, update in expected.modules.items():  # 8 bits for the rows of 32 and 64 values, 16 for those of rank 4
        error = (packed.modules[name].delta() - update.delta()).abs().max() / update.delta().abs().max()
        assert 0 < error < 0.02, name


def test_what_is_written_is_what_llama_cpp_writes(tmp_path):
    from gguf import GGUFReader

    FORMAT.write(read_updates(_FIXTURES / "llama_peft"), tmp_path / "out.gguf", base_config=_CONFIG)
    theirs, ours = GGUFReader(_FIXTURES / "llama_f32.gguf"), GGUFReader(tmp_path / "out.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == tensors.keys() and len(tensors) == 12
    for tensor in ours.tensors:
        assert np.array_equal(tensor.data, tensors[tensor.name]), tensor.name
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.fields[key].contents() == theirs.fields[key].contents(), key


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_those_of_llama_cpp(name):
    import gguf
    import transformers

    family = FAMILIES[name]
    kinds = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[family.architecture], 3)
    for slot, module in family.names.items():
        assert table.get_name(family.layer.format(2) + module) == f"blk.2.{slot}"
    assert table.get_name(family.embedding) == "token_embd" and table.get_name("lm_head") in {"output", None}
    config = getattr(transformers, name).config_class()
    assert bool(config.tie_word_embeddings) == family.tied


@settings(max_examples=60)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (8, 1)]),
    size=st.sampled_from([2, 4, 8]),
    ranks=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    alphas=st.lists(st.one_of(st.none(), st.floats(0.015625, 64, width=32)), min_size=3, max_size=3),
    rslora=st.booleans(),
)
def test_a_round_trip_changes_no_update(tmp_path_factory, heads, size, ranks, alphas, rslora):
    path = tmp_path_factory.mktemp("gguf") / "out.gguf"
    config = {**_CONFIG, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    outs = (heads[0] * size, heads[1] * size, 12)
    names = (_Q, _K, "model.model.layers.11.mlp.down_proj")
    modules = {
        name: lora(out, 10, rank, alpha, rslora=rslora)
        for name, out, rank, alpha in zip(names, outs, ranks, alphas, strict=True)
    }
    FORMAT.write(AdapterUpdates(modules), path, base_config=config)
    for base in (config, None):  # the file itself says how many heads there are
        again = read_updates(path, base)
        assert again.modules.keys() == modules.keys()
        for name, update in modules.items():
            expected = update.delta()
            assert (again.modules[name].delta() - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())


def test_half_precision_is_kept_where_nothing_is_multiplied_in(tmp_path):
    from gguf import GGUFReader

    factors = {"A": torch.randn(2, 8).half(), "B": torch.randn(8, 2).half()}
    modules = {_Q: ModuleUpdate("lora", factors, 4.0)}
    FORMAT.write(AdapterUpdates(modules), tmp_path / "half.gguf", base_config=_CONFIG)
    assert {tensor.data.dtype for tensor in GGUFReader(tmp_path / "half.gguf").tensors} == {np.dtype(np.float16)}
    modules[_K] = ModuleUpdate("lora", factors, 3.0)
    FORMAT.write(AdapterUpdates(modules), tmp_path / "whole.gguf", base_config=_CONFIG)
    assert {tensor.data.dtype for tensor in GGUFReader(tmp_path / "whole.gguf").tensors} == {np.dtype(np.float32)}
    again = read_updates(tmp_path / "whole.gguf", _CONFIG)
    assert all(torch.allclose(again.modules[name].delta(), u.delta(), rtol=1e-6) for name, u in modules.items())


def test_an_update_of_scale_zero_stays_one(tmp_path):
    """llama.cpp takes an alpha of 0 for a scale of 1."""
    FORMAT.write(AdapterUpdates({_Q: lora(16, 8, 4, 0.0)}), tmp_path / "out.gguf", base_config=_CONFIG)
    assert read_updates(tmp_path / "out.gguf").modules[_Q].delta().abs().max() == 0


REFUSED = {
    "DoRA": ({_Q: lora(16, 8, magnitude=torch.ones(16))}, "has a magnitude .DoRA"),
    "bias": ({_Q: lora(16, 8, bias=torch.ones(16))}, "changes a bias"),
    "kind": (
        {_Q: ModuleUpdate("diff", {"diff": torch.ones(16, 8)})},
        "of the kind diff, and a GGUF adapter holds LoRA",
    ),
    "image": ({"unet.mid_block.proj": lora(16, 8)}, "for one text model"),
    "module": (
        {"model.model.layers.0.self_attn.q_norm": lora(16, 8)},
        "applies no adapter to 'model.layers.0.self_attn",
    ),
    "experts": ({"model.model.layers.0.mlp.experts.3.up_proj": lora(16, 8)}, "applies no adapter to"),
    "heads": ({_Q: lora(12, 8)}, "no 4 heads of even size"),
    "convolution": (
        {_Q: ModuleUpdate("lora", {"A": torch.ones(2, 8, 3, 3), "B": torch.ones(8, 2, 1, 1)})},
        "a convolution",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_hold_is_refused(case, tmp_path):
    modules, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        FORMAT.write(AdapterUpdates(modules), tmp_path / "out.gguf", base_config=_CONFIG)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".out*"))


def test_a_base_that_is_not_known_or_shares_its_embedding_is_refused(tmp_path):
    out = tmp_path / "out.gguf"
    head = AdapterUpdates({"model.lm_head": lora(16, 8)})
    with pytest.raises(
        InputError, match=r"that of the base is not known; written are .*LlamaForCausalLM.* Give the base"
    ):
        FORMAT.write(head, out)
    with pytest.raises(InputError, match="that of the base is 'FalconForCausalLM'"):
        FORMAT.write(head, out, base_config={"architectures": ["FalconForCausalLM"]})
    with pytest.raises(InputError, match="one weight as its embedding and its output"):
        FORMAT.write(head, out, base_config={**_CONFIG, "tie_word_embeddings": True})
    with pytest.raises(InputError, match="depends on the number of heads; give the base"):
        FORMAT.write(AdapterUpdates({_Q: lora(16, 8)}), out, base_config={"architectures": ["LlamaForCausalLM"]})
    whole = AdapterUpdates({_Q: lora(16, 8)}, extra={"model.score.weight": torch.ones(2, 8)})
    with pytest.raises(InputError, match=r"no place for whole modules, such as 'model\.score\.weight'"):
        FORMAT.write(whole, out, base_config=_CONFIG)


def test_files_that_are_no_adapter_of_this_base_are_refused(tmp_path):
    raw = (_FIXTURES / "llama_f32.gguf").read_bytes()
    path = tmp_path / "bad.gguf"

    def refused(changed: bytes, message: str, config=None) -> None:
        path.write_bytes(changed)
        with pytest.raises(FileFormatError, match=message):
            read_updates(path, config)

    refused(raw, "does not say how many there are; give its base")
    refused(raw, "architecture 'llama', and the base is of 'qwen2'", {"architectures": ["Qwen2ForCausalLM"]})
    refused(raw.replace(b"\x07\0\0\0\0\0\0\0adapter", b"\x05\0\0\0\0\0\0\0model"), "is a GGUF model, not an adapter")
    refused(raw[:-300], "it is truncated")
    refused(raw[:100], "inside its header: it is truncated")
    refused(raw + bytes(64), "64 bytes follow the last tensor")
    refused(
        raw.replace(b"blk.0.attn_q.weight.lora_a", b"blk.0.attn_z.weight.lora_a"), "no update of a weight of 'llama'"
    )
    refused(raw.replace(b"blk.0.attn_v.weight.lora_a", b"blk.1.attn_v.weight.lora_a"), "only lora_", _CONFIG)
    refused(raw.replace(b"blk.0.attn_v.weight.lora_a", b"blk.0.attn_k.weight.lora_a"), "is there twice", _CONFIG)
    refused(b"GGUF" + (7).to_bytes(4, "little") + raw[8:], "of version 7")
