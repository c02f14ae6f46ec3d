"""Target modules on real architectures, built without weights."""

import re

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
)

from haori.bases.targets import linear_modules, resolve_targets
from haori.core.errors import InputError

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ),
    "gpt2": GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2),
    "neox": GPTNeoXConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ),
    "bert": BertConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
}


def build(kind: str) -> PreTrainedModel:
    with torch.device("meta"):
        if kind == "bert":
            return AutoModel.from_config(CONFIGS[kind])
        return AutoModelForCausalLM.from_config(CONFIGS[kind])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.mark.parametrize(
    ("kind", "linear", "attention"),
    [
        ("llama", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", "q_proj k_proj v_proj o_proj"),
        ("gpt2", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", "attn.c_attn attn.c_proj"),
        (
            "neox",
            "query_key_value attention.dense dense_h_to_4h dense_4h_to_h",
            "query_key_value attention.dense",
        ),
        (
            "bert",
            "self.query self.key self.value attention.output.dense intermediate.dense 0.output.dense 1.output.dense "
            "pooler.dense",
            "self.query self.key self.value attention.output.dense",
        ),
    ],
)
def test_groups(kind: str, linear: str, attention: str) -> None:
    model = build(kind)

    def ending(words: str) -> list[str]:
        return [name for name, _ in model.named_modules() if name.endswith(tuple(f".{w}" for w in words.split()))
                or name in words.split()]  # fmt: skip

    assert linear_modules(model) == ending(linear) == resolve_targets(model, "all-linear")
    assert resolve_targets(model, "attention") == ending(attention)


def test_peft_accepts_what_is_resolved(tiny_base_folder) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    wanted = resolve_targets(model, ("attention", "down_proj"))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=wanted))
    found = [name.removesuffix(".lora_A") for name, _ in wrapped.base_model.model.named_modules()
             if name.endswith(".lora_A")]  # fmt: skip
    assert found == wanted


def test_names_match_by_suffix_and_regex_by_the_whole_name(llama: PreTrainedModel) -> None:
    assert resolve_targets(llama, "q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert resolve_targets(llama, "1.self_attn.q_proj") == ["model.layers.1.self_attn.q_proj"]
    assert resolve_targets(llama, r".*\.0\..*_proj") == resolve_targets(
        llama, [f"0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                   "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
    )  # fmt: skip
    assert resolve_targets(llama, ("v_proj", "q_proj"))[:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]
    assert resolve_targets(llama, ("lm_head", "embed_tokens")) == ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("q_porj", "The base has no module 'q_porj'; did you mean 'q_proj'"),
        ("q_porj", "Its linear modules are: q_proj, k_proj, v_proj"),
        ("zzzz", "no name comes close"),
        ("mlp", "names a LlamaMLP"),
        (r".*\.q_pro", "has no module"),
        ("(q_proj", "not a valid regular expression"),
        ((), "The target is empty"),
        (("q_proj", "x_proj"), "has no module 'x_proj'; did you mean"),
        ("", "has no module"),
    ],
)
def test_bad_targets_name_the_remedy(llama: PreTrainedModel, target, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        resolve_targets(llama, target)


def test_a_model_without_attention_says_so() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert linear_modules(model) == ["0"]
    with pytest.raises(InputError, match="no modules for 'attention'"):
        resolve_targets(model, "attention")
