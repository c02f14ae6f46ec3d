"""The fused path against stock PEFT: outputs, gradients and optimizer steps must be the same."""

import copy
import warnings
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from haori.adapters.fused import fuse
from haori.adapters.fused.loss_forward import why_no_head

VOCABULARY, WIDTH, LAYERS = 97, 48, 2
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 80, "num_hidden_layers": LAYERS,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama-tied-bias": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-from-gguf": ("Llama", LLAMA | {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None}),
    "mistral-window": ("Mistral", LLAMA | {"sliding_window": 16}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "gemma": ("Gemma", LLAMA | {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}),
    "smollm3": (  # of four layers, the last has no rotation
        "SmolLM3",
        LLAMA | {"num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
}
WHOLE = {"attention blocks": LAYERS, "MLPs": LAYERS, "loss head": 1}


def base_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """Stock PEFT with B drawn at random, so that every gradient matters."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(base_of(family, dtype), LoraConfig(**settings))
    draw_b(model)
    return model.train()


def draw_b(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_E" in name:
            parameter.data = (0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def batch(rows: int = 3, length: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded rows; labels on the second half of each."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        end = length - 5 * row
        mask[row, end:] = 0
        labels[row, end:] = -100
        labels[row, : end // 2] = -100
    return ids, mask, labels


def loss_of(model: nn.Module, *, fused: bool) -> torch.Tensor:
    ids, mask, labels = batch()
    if fused:
        total, each = model(input_ids=ids, attention_mask=mask, use_cache=False, head_targets=labels[:, 1:])
        assert torch.allclose(each.sum(), total)
        return total / len(each)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


def gradients(model: nn.Module, *, fused: bool) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(4)
    model.zero_grad()
    loss = loss_of(model, fused=fused)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    return max(float((found[n] - g).norm()) / max(float(g.norm()), 1e-3 * largest) for n, g in expected.items())


def assert_same_in_fp32(model: nn.Module, expect: dict[str, int] = WHOLE) -> None:
    stock_loss, stock = gradients(model, fused=False)
    fused = fuse(model)
    assert fused.report.fused.items() >= expect.items(), fused.report.sentence()
    loss, found = gradients(model, fused=True)
    assert loss == pytest.approx(stock_loss, abs=2e-6)
    assert worst(found, stock) < 2e-4
    fused.remove()
    again_loss, again = gradients(model, fused=False)
    assert again_loss == stock_loss
    assert all(torch.equal(again[n], g) for n, g in stock.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_families_run_whole_and_equal_peft(family: str):
    layers = FAMILIES[family][1]["num_hidden_layers"]
    assert_same_in_fp32(adapted(family), {"MLPs": layers, "loss head": 1} if family == "smollm3" else WHOLE)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 1},
        {"r": 16, "use_rslora": True},
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["v_proj", "gate_proj"], "use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 1}},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_equal_peft(options: dict[str, Any]):
    assert_same_in_fp32(adapted(**options), {"loss head": 1})


@pytest.mark.parametrize("installed", ["training", "evaluating"])
def test_dropout_is_not_drawn_in_evaluation(installed: str):
    model = adapted(lora_dropout=0.5).train(installed == "training")
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask).logits
        fused = fuse(model.train(installed == "training"))
        found = model.eval()(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.std()))
    with torch.no_grad():
        drawn = model.train()(input_ids=ids, attention_mask=mask).logits
    fused.remove()
    assert not torch.allclose(drawn, expected, atol=0.1 * float(expected.std()))


def test_adalora_equals_peft():
    torch.manual_seed(1)
    config = AdaLoraConfig(
        init_r=6, target_r=4, total_step=100, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM",
        orth_reg_weight=0.1,
    )  # fmt: skip
    model = get_peft_model(base_of("llama"), config)
    draw_b(model)
    assert_same_in_fp32(model.train(), {"loss head": 1, "linear layers": 3 * LAYERS})


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_near_to_fp32_as_peft_is(options: dict[str, Any], autocast: bool):
    reference = adapted(**options)
    exact = copy.deepcopy(reference)
    exact_loss, expected = gradients(exact, fused=False)
    model = adapted(dtype=torch.bfloat16, **options)
    for (_, mine), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if mine.requires_grad:
            mine.data = theirs.data.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stock_loss, stock = gradients(model, fused=False)
        fuse(model)
        loss, found = gradients(model, fused=True)
    assert abs(loss - exact_loss) < max(2 * abs(stock_loss - exact_loss), 2e-3)
    assert worst(found, expected) < max(1.5 * worst(stock, expected), 0.05)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.2}], ids=["lora", "dora", "dropout"])
def test_ten_optimizer_steps_equal_peft(options: dict[str, Any]):
    results = []
    for fused in (False, True):
        model = adapted(**options)
        if fused:
            fuse(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        torch.manual_seed(5)
        losses = []
        for _ in range(10):
            loss = loss_of(model, fused=fused)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append((losses, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}))
    (stock_losses, stock), (losses, found) = results
    assert losses == pytest.approx(stock_losses, abs=1e-3)
    assert losses[-1] < losses[0]
    assert worst(found, stock) < 1e-2


def test_activation_checkpointing_gives_the_same_gradients():
    model = adapted()
    _, expected = gradients(model, fused=False)
    fuse(model)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    _, found = gradients(model, fused=True)
    assert worst(found, expected) < 2e-4


def test_no_gradient_reaches_frozen_weights_or_the_first_input():
    model = adapted()
    fuse(model)
    _, found = gradients(model, fused=True)
    assert all("lora_" in name for name in found)


def test_a_model_of_another_kind_runs_layer_by_layer():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = get_peft_model(transformers.BertModel(config), LoraConfig(r=4, target_modules="all-linear"))
    draw_b(model)
    ids, mask, _ = batch()

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask).last_hidden_state
        output.square().mean().backward()
        return output.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    output, expected = run()
    report = fuse(model).report
    assert report.fused == {"linear layers": 13}
    fused_output, found = run()
    assert torch.allclose(output, fused_output, atol=1e-5)
    assert worst(found, expected) < 2e-4


def test_what_does_not_run_fused_says_why():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out for Conv1D and says so
        model = get_peft_model(transformers.GPT2LMHeadModel(config), LoraConfig(target_modules=["c_attn"]))
    fused = fuse(model)
    assert "Stock path" in fused.report.sentence()
    assert "stored transposed" in fused.report.sentence()
    assert not fused.patched
    with_bias = fuse(adapted("llama-tied-bias", lora_bias=True))
    assert "its B has a bias" in with_bias.report.sentence()


def test_a_switched_off_adapter_is_the_base():
    model = adapted()
    ids, _, _ = batch()
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids, use_cache=False).logits
    fuse(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-6)


def test_generation_with_a_cache_is_unchanged():
    model = adapted().eval()
    ids, _, _ = batch(rows=1, length=12)
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    fuse(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0), expected)


def test_probing_uses_up_no_random_numbers():
    model = adapted(lora_dropout=0.5)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fuse(model)
    assert torch.equal(torch.rand(3), expected)


def shared_batch(rows: int, shared: int, own: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that begin with the same tokens, right-padded, with labels in the prefix too."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(1, VOCABULARY, (rows, shared + own), generator=generator)
    ids[:, :shared] = ids[0, :shared]
    ids[:, shared] = torch.arange(1, rows + 1)  # the first token of their own differs
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, ids.shape[1] - row :] = 0
    labels = torch.where(mask == 1, ids, -100)
    labels[:, 1::3] = -100
    return ids, mask, labels


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mistral"])
@pytest.mark.parametrize(("shared", "own"), [(20, 9), (70, 3), (1, 12), (3, 90)])
def test_rows_that_begin_alike_are_computed_once_with_the_same_result(family: str, shared: int, own: int):
    model = adapted(family)
    ids, mask, labels = shared_batch(4, shared, own)

    def run(fused: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        if fused:
            total, _ = model(input_ids=ids, attention_mask=mask, use_cache=False, head_targets=labels[:, 1:])
        else:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            total = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        total.backward()
        return total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, expected = run(fused=False)
    tokens: list[int] = []
    fuse(model)
    model.get_base_model().get_decoder().embed_tokens.register_forward_hook(
        lambda _, args, __: tokens.append(args[0].numel())
    )
    shared_loss, found = run(fused=True)
    worthwhile = 3 * shared >= 0.05 * ids.numel()
    assert tokens == [shared + 4 * own if worthwhile else ids.numel()]
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert worst(found, expected) < 2e-4


def test_prefixes_are_not_shared_where_that_would_change_the_result():
    ids, mask, labels = shared_batch(4, 20, 9)
    for model in (adapted(lora_dropout=0.1), adapted("mistral-window")):
        tokens: list[int] = []
        fuse(model)
        embedding = model.get_base_model().get_decoder().embed_tokens
        embedding.register_forward_hook(lambda _, args, __, seen=tokens: seen.append(args[0].numel()))
        model(input_ids=ids, attention_mask=mask, use_cache=False, head_targets=labels[:, 1:])
        assert tokens == [ids.numel()]


def test_a_sliding_window_shorter_than_the_rows_is_kept():
    assert_same_in_fp32(adapted("mistral-window"))


def test_shared_prefixes_with_activation_checkpointing():
    model = adapted()
    ids, mask, labels = shared_batch(4, 20, 9)
    fuse(model)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, use_cache=False, head_targets=labels[:, 1:])[0].backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert worst(results[1], results[0]) < 1e-5


def test_ard_lora_equals_its_slow_path():
    from haori.adapters.ard_lora import ArdLoraConfig

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base_of("llama"), ArdLoraConfig(r=4, lora_alpha=8, target_modules=targets))
    draw_b(model)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "ard_rho" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    assert_same_in_fp32(model.train())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_equal_the_slow_path(bits: int, tmp_path: Any):
    base_of("llama").save_pretrained(tmp_path)
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantised, dtype=torch.float32
    )
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    draw_b(model)
    model.train()
    stock_loss, stock = gradients(model, fused=False)
    report = fuse(model).report
    if bits == 8:
        assert "LLM.int8 rounds activations" in report.sentence()
        assert report.fused["linear layers"] == 0
    else:
        assert report.fused["linear layers"] == 7 * LAYERS, report.sentence()
    loss, found = gradients(model, fused="loss head" in report.fused)
    assert loss == pytest.approx(stock_loss, abs=1e-4)
    assert worst(found, stock) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "factor"),
    [
        *product([{}, {"use_rslora": True}], [0.0, 0.9, 1.1, -1.0]),
        # DoRA divides by the norm of W + s B A, which takes half of a wrong scale back.
        *product([{"use_dora": True}], [0.0, 0.8, 1.25, -1.0]),
    ],
)
def test_a_fused_form_that_is_wrong_about_the_adapter_is_not_used(
    options: dict[str, Any], factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    from haori.adapters.fused import trial
    from haori.adapters.fused.factors import LinearPlan, linear_plan

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    model = get_peft_model(base_of("llama", dtype), LoraConfig(**settings))  # fresh: B is zero
    before = {name: value.clone() for name, value in model.named_parameters()}
    honest = fuse(model)
    assert honest.report.fused.items() >= WHOLE.items(), honest.report.sentence()
    honest.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())

    def lying(layer: nn.Module) -> LinearPlan:
        plan = linear_plan(layer)
        return plan._replace(scale=factor * plan.scale)

    monkeypatch.setattr("haori.adapters.fused.modules.linear_plan", lying)
    assert trial.linear_plan is linear_plan
    fused = fuse(model)
    assert fused.report.fused["MLPs"] == fused.report.fused["attention blocks"] == 0, fused.report.sentence()
    fused.remove()


def test_a_model_that_goes_around_its_inner_model_keeps_its_own_head():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                       word_embed_proj_dim=32, max_position_embeddings=64)  # fmt: skip
    assert why_no_head(OPTForCausalLM(config)) is not None
