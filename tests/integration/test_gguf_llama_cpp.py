"""GGUF adapters in llama.cpp itself: its logits against those of stock PEFT. Needs llama-cpp-python.

To run it: pip install --target DIR llama-cpp-python, then PYTHONPATH=DIR pytest -m slow with this file.
"""

import warnings

import numpy as np
import pytest

from haori.library.formats.gguf import FORMAT
from haori.library.formats.registry import read_updates
from tests.library_samples import change_tensors

pytestmark = pytest.mark.slow
_TOKENS = [5, 9, 33, 7, 21, 40, 2, 11]


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    ))  # fmt: skip


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    ))  # fmt: skip


def write_base(model, path):
    """Write a model as llama.cpp keeps it; the order of rows is that of its rotary embedding, in pairs."""
    import gguf

    config = model.config
    rotated = config.model_type == "llama"
    names = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "gpt2": gguf.MODEL_ARCH.GPT2}
    layers = config.num_hidden_layers
    table = gguf.get_tensor_name_map(names[config.model_type], layers)
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(128)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(64)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(8)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float().numpy()
        if rotated and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = value.shape[0] // 8
            value = np.stack([value.reshape(heads, 2, 4, -1)[:, half] for half in (0, 1)], 2).reshape(value.shape)
        if config.model_type == "gpt2" and ".c_" in name and value.ndim == 2:
            value = value.T
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_logits(base, adapter=None):
    from llama_cpp import Llama

    model = Llama(str(base), lora_path=adapter and str(adapter), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    model.eval(_TOKENS)
    scores = np.array(model._scores[: len(_TOKENS)])
    model.close()
    return scores


CASES = {
    "llama": (_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "llama, embedding and output": (_llama, ["q_proj", "embed_tokens", "lm_head"]),
    "llama, 16 bits": (_llama, ["q_proj", "k_proj", "down_proj"]),
    "qwen2": (_qwen2, ["q_proj", "k_proj", "o_proj", "down_proj"]),
    "gpt2": (_gpt2, ["c_attn", "c_proj", "c_fc"]),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_peft_does(case, tmp_path):
    pytest.importorskip("llama_cpp")
    import gguf
    import torch
    from peft import LoraConfig, get_peft_model

    build, targets = CASES[case]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    write_base(model, tmp_path / "base.gguf")
    config = model.config.to_dict()
    tokens = torch.tensor([_TOKENS])
    with torch.no_grad():
        plain = model(tokens).logits[0].numpy()
    half = case.endswith("16 bits")
    patterns = {} if half else {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[-1]: 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **patterns)).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
                parameter.data = parameter.data.half().float()
        adapted.save_pretrained(tmp_path / "peft")
    if half:
        change_tensors(tmp_path / "peft", lambda found: found.update({k: v.half() for k, v in found.items()}))
    with torch.no_grad():
        expected = adapted(tokens).logits[0].numpy()
    config = {**config, "architectures": [type(model).__name__]}
    FORMAT.write(read_updates(tmp_path / "peft", config), tmp_path / "adapter.gguf", base_config=config)
    changed = np.abs(expected - plain).max()
    assert np.abs(llama_cpp_logits(tmp_path / "base.gguf") - plain).max() < 2e-3 * max(1, np.abs(plain).max())
    found = llama_cpp_logits(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors} == {
        "F16" if half else "F32"
    }
    assert changed > 0.2
    assert np.abs(found - expected).max() < 0.01 * changed
