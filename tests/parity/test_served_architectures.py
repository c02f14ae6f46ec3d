"""What is served, generated and streamed is what transformers with PEFT gives, token for token, whatever the base."""

import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from haori import bases
from haori.bases import find_base
from haori.bases.targets import resolve_targets
from haori.core.errors import BaseError, InputError, MismatchError
from haori.library import inspect_adapter
from haori.serve.adapters.reading import read_adapter_weights
from haori.serve.engine.runner import Run
from haori.serve.engine.scheduler import EngineLimits
from haori.serve.opening import open_runner
from tests.library_samples import save_stock

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}
ROPE = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 36}
LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 36, "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-yarn": ("Llama", {"rope_parameters": ROPE | {"rope_type": "yarn"}}),
    "llama-dynamic": ("Llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}),
    "llama-longrope": ("Llama", {"rope_parameters": LONG}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-moe": ("Qwen2Moe", EXPERTS),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 16}),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 16}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {"sliding_window": 16}),
    "gpt2": ("GPT2", GPT),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 4}),
    "gpt-neox": ("GPTNeoX", {}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16}),
    "falcon": ("Falcon", {}),
    "falcon-new": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "granite": ("Granite", {"residual_multiplier": 0.5, "attention_multiplier": 0.5}),
    "cohere": ("Cohere", {}),
    "mamba": ("Mamba", {"state_size": 4}),
    "mamba2": ("Mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}),
    "falcon-mamba": ("FalconMamba", {"state_size": 4}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
}
LIMITS = EngineLimits(context_length=160, running=4, waiting=4)
PROMPTS = [[(29 * i + i // 7) % 90 + 4 for i in range(length)] for length in (40, 3, 21)]
STEPS = 12
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def build(folder, kind, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{'Gemma3Text' if kind == 'Gemma3' else kind}Config")
    model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")
    built = model(config(**SIZES | options))
    for value in built.parameters():  # of the start, all logits are nearly the same
        value.data.mul_(3.0 if value.dim() > 1 else 1.0)
    built.save_pretrained(folder)
    return folder


def stock(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapt(folder, base, **options):
    """An adapter by stock PEFT with every value moved."""
    model = stock(base)
    settings = {
        "target_modules": resolve_targets(model, "all-linear"),
        "fan_in_fan_out": "GPT2" in type(model).__name__,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of trained weights that were tied
        adapted = get_peft_model(model, LoraConfig(**LORA | settings | options))
    draw = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=draw) * 0.1
    return save_stock(adapted, folder)


def adapted_stock(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(stock(base), folder).eval()


def greedy(model, prompt, steps=STEPS):
    """Tokens by whole forwards of a stock model, without cache or padding, and the logits of each."""
    tokens, found = list(prompt), []
    with torch.no_grad():
        for _ in range(steps):
            found.append(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float())
            tokens.append(int(found[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(found)


def served(opened, prompt, mix, steps=STEPS):
    """The same from a runner: the prompt in two pieces, then token by token."""
    runner, half = opened.runner, len(prompt) // 2
    place, found = runner.cache.open(len(prompt) + steps), []
    runner.step([Run(place, 0, prompt[:half], mix, wants_logits=False)])
    new, start = prompt[half:], half
    for _ in range(steps):
        found.append(runner.step([Run(place, start, new, mix)])[0].float())
        start, new = start + len(new), [int(found[-1].argmax())]
    runner.cache.close(place)
    return [int(logits.argmax()) for logits in found], torch.stack(found)


def put(opened, folder):
    weights = read_adapter_weights(inspect_adapter(folder), opened.tensors, adapter="sha256:a", dtype=opened.dtype)
    opened.runner.bank.put(opened.runner.bank.prepare(weights))
    return (("sha256:a", 1.0),)


class Tokenizer:
    """Texts are the ids themselves."""

    pad_token_id, eos_token_id, chat_template = 0, None, None
    all_special_tokens, all_special_ids = (), ()

    def get_added_vocab(self):
        return {}

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"

    def decode(self, tokens, **_):
        return "".join(f"<{token}>" for token in tokens)


@pytest.fixture
def no_end(monkeypatch):
    """Answers go on until they are as long as asked for."""
    monkeypatch.setattr("haori.bases.generation.end_tokens", lambda _: [])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_served_generated_and_streamed_are_what_stock_peft_gives(name, tmp_path, no_end):
    base = find_base(str(build(tmp_path / "base", *ARCHITECTURES[name])))
    folder = adapt(tmp_path / "adapter", base.path)
    opened = open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20)
    reference = adapted_stock(base.path, folder)
    expected = [greedy(reference, prompt) for prompt in PROMPTS]
    mix = put(opened, folder)
    for prompt, (tokens, logits) in zip(PROMPTS, expected, strict=True):
        found, theirs = served(opened, prompt, mix)
        assert found == tokens
        torch.testing.assert_close(theirs, logits, rtol=1e-3, atol=1e-3 * float(logits.std()))
    with reference.disable_adapter():
        tokens, logits = greedy(reference, PROMPTS[0])
    found, theirs = served(opened, PROMPTS[0], ())
    assert found == tokens
    assert float((theirs - expected[0][1]).abs().max()) > 0.1 * float(logits.std())  # the adapter matters
    texts = ["".join(f"<{token}>" for token in tokens) for tokens, _ in expected]
    assert bases.generate(reference, Tokenizer(), PROMPTS, max_new_tokens=STEPS) == texts
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert "".join(bases.stream(reference, Tokenizer(), prompt, max_new_tokens=STEPS)) == text


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_gpt2_adapters_of_every_kind_are_served(options, tmp_path):
    base = find_base(str(build(tmp_path / "base", *ARCHITECTURES["gpt2"])))
    folder = adapt(tmp_path / "adapter", base.path, **options)
    opened = open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20)
    tokens, logits = greedy(adapted_stock(base.path, folder), PROMPTS[0])
    found, theirs = served(opened, PROMPTS[0], put(opened, folder))
    assert found == tokens
    torch.testing.assert_close(theirs, logits, rtol=1e-3, atol=1e-3 * float(logits.std()))


def test_a_gpt2_whose_files_lack_the_prefix_is_served(tmp_path):
    """As the published one: h.0.attn.c_attn, wte."""
    from safetensors.torch import load_file, save_file

    folder = build(tmp_path / "base", *ARCHITECTURES["gpt2"])
    adapter = adapt(tmp_path / "adapter", folder, use_dora=True, modules_to_save=["ln_f"])
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    opened = open_runner(find_base(str(folder)), LIMITS, weights="fp32", cache_bytes=8 << 20)
    tokens, logits = greedy(adapted_stock(folder, adapter), PROMPTS[0])
    found, theirs = served(opened, PROMPTS[0], put(opened, adapter))
    assert found == tokens
    torch.testing.assert_close(theirs, logits, rtol=1e-3, atol=1e-3 * float(logits.std()))


TRAINED_TABLES = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head-tokens": {"trainable_token_indices": {"lm_head": [5, 9, 70]}},
    "both-tokens": {"trainable_token_indices": {"embed_tokens": [5, 9, 70], "lm_head": [4, 9]}},
    "embedding-tokens": {"trainable_token_indices": [5, 9, 70]},
}


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])  # the fast runner, and the slow one
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", TRAINED_TABLES)
def test_a_trained_embedding_or_head_is_served(name, tied, kind, tmp_path):
    options = {"tie_word_embeddings": tied} | ({"sliding_window": 16} if kind == "Mistral" else {})
    base = find_base(str(build(tmp_path / "base", kind, options)))
    folder = adapt(tmp_path / "adapter", base.path, target_modules=["q_proj"], **TRAINED_TABLES[name])
    reference = adapted_stock(base.path, folder)
    tokens, logits = greedy(reference, PROMPTS[0])
    for _ in range(2):  # the second from what was remembered
        opened = open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20)
        assert (opened.slow_because is None) == (kind == "Llama")
        found, theirs = served(opened, PROMPTS[0], put(opened, folder))
        assert found == tokens
        torch.testing.assert_close(theirs, logits, rtol=1e-3, atol=1e-3 * float(logits.std()))


def test_a_base_that_keeps_its_state_for_itself_is_refused(tmp_path):
    base = find_base(str(build(tmp_path / "base", "Rwkv", {"attention_hidden_size": 32})))
    with pytest.raises(BaseError, match=r"RwkvForCausalLM, which keeps .* cannot be served"):
        open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20)


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Mamba2"])
def test_what_mamba_reads_past_an_adapter_is_not_a_target(kind, tmp_path):
    options = next(options for name, options in ARCHITECTURES.values() if name == kind)
    model = stock(build(tmp_path / "base", kind, options))
    chosen = resolve_targets(model, "all-linear")
    assert {name.rpartition(".")[2] for name in chosen} == ({"in_proj"} if kind == "Mamba2" else {"in_proj", "x_proj"})
    with pytest.raises(InputError, match=r"out_proj.*kernels of Mamba.*in_proj"):
        resolve_targets(model, ["out_proj"])
    for name in chosen:  # each of them acts
        adapted = get_peft_model(stock(tmp_path / "base"), LoraConfig(**LORA, target_modules=[name]))
        ids = torch.tensor([PROMPTS[0]])
        before = adapted(input_ids=ids).logits
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(0.3)
        assert not torch.allclose(adapted(input_ids=ids).logits, before)


def test_an_update_that_no_hook_would_apply_is_refused(tmp_path):
    """PEFT itself wraps it and computes without it."""
    base = find_base(str(build(tmp_path / "base", *ARCHITECTURES["mamba"])))
    folder = adapt(tmp_path / "adapter", base.path, target_modules=["dt_proj", "in_proj"])
    opened = open_runner(base, LIMITS, weights="fp32", cache_bytes=8 << 20)
    with pytest.raises((InputError, MismatchError), match="dt_proj"):
        put(opened, folder)


def test_what_a_base_says_of_generation_changes_no_answer(tmp_path, no_end):
    base = find_base(str(build(tmp_path / "base", *ARCHITECTURES["llama"])))
    model = stock(base.path)
    tokens, _ = greedy(model, PROMPTS[0])
    text = Tokenizer().decode(tokens)
    said = model.generation_config
    said.update(suppress_tokens=tokens[:3], repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=3, top_k=1)
    assert bases.generate(model, Tokenizer(), PROMPTS[:1], max_new_tokens=STEPS) == [text]
    assert "".join(bases.stream(model, Tokenizer(), PROMPTS[0], max_new_tokens=STEPS)) == text
    assert model.generation_config is said


def test_rows_of_a_batch_do_not_read_the_padding_of_rwkv(tmp_path, no_end):
    model = stock(build(tmp_path / "base", "Rwkv", {"attention_hidden_size": 32}))
    texts = [Tokenizer().decode(greedy(model, prompt)[0]) for prompt in PROMPTS]
    assert bases.generate(model, Tokenizer(), PROMPTS, max_new_tokens=STEPS) == texts
    assert ["".join(bases.stream(model, Tokenizer(), prompt, max_new_tokens=STEPS)) for prompt in PROMPTS] == texts
