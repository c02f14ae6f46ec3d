import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from haori.adapters.ard_lora import ArdLoraConfig, ArdLoraLayer, behaviour, check, insert, register, to_lora
from haori.adapters.ard_lora.gates import amounts, bounds, gates, open_ranks, rho_of_rank, rounded_ranks
from haori.adapters.ard_lora.heads import head_layout
from haori.adapters.ard_lora.tuner import require_adaptable
from haori.adapters.insertion import Insertion
from haori.adapters.methods import behaviour_of, check_method, insert_method
from haori.bases import find_base, load_skeleton
from haori.core.errors import FileFormatError, InputError, MismatchError
from haori.core.methods import ArdLoraMethod
from tests.library_samples import PROBES, run, save_stock, stock_logits, stock_lora

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = [f"model.layers.{i}.{'self_attn' if leaf[0] in 'qkvo' else 'mlp'}.{leaf}" for i in range(2) for leaf in LEAVES]


def section(**keys):
    return ArdLoraMethod(**{"kind": "ard_lora", "rank": 4, "alpha": 8.0, **keys})


def base_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def inserted(folder, tokenizer, method=None, targets=NAMES):
    return insert_method(base_model(folder), tokenizer, method or section(), targets, Insertion(seed=1, steps=10))


def train(model, added, steps, optimizer, first=1):
    for step in range(first, first + steps):
        ids = torch.tensor([PROBES[step % 2]])
        loss = model(input_ids=ids, labels=ids).loss
        if (penalty := added.penalty()) is not None:
            loss = loss + penalty
        loss.backward()
        optimizer.step()
        added.after_step(step)
        optimizer.zero_grad()


def optimizer_of(added):
    groups = added.parameter_groups(0.0)
    return torch.optim.AdamW([{**group, "lr": group.get("lr_peak", 1e-2)} for group in groups])


# Gates


@pytest.mark.parametrize("start", [1, 3, 8, 64, 256])
def test_whole_ranks_give_gates_of_exactly_one_and_zero(start):
    for rank in {1, start, 2 * start - 1, 2 * start}:
        rho = torch.tensor([rho_of_rank(rank, start)])
        found = gates(amounts(rho, start), 2 * start)
        assert torch.equal(found, (torch.arange(2 * start) < rank).float()[None])
        assert open_ranks(rho, start) == [rank]


def test_soft_gates_open_one_after_the_other():
    rho = torch.tensor([rho_of_rank(2.25, 4), rho_of_rank(0.1, 4), rho_of_rank(30, 4)])
    found = gates(amounts(rho, 4), 8)
    assert torch.allclose(found[0], torch.tensor([1, 1, 0.25, 0, 0, 0, 0, 0]), atol=1e-5)
    assert found[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]  # never less than rank 1
    assert found[2].tolist() == [1] * 8  # never more than twice the start
    assert open_ranks(rho, 4) == [3, 1, 8]


def test_ranks_are_rounded_to_the_nearest():
    rhos = [torch.tensor([rho_of_rank(2.4, 4), rho_of_rank(2.6, 4)]), torch.tensor([rho_of_rank(0.2, 4)])]
    assert [open_ranks(rho, 4) for rho in rounded_ranks(rhos, 4)] == [[2, 3], [1]]


def test_gradient_passes_where_an_amount_is_whole():
    rho = torch.tensor([rho_of_rank(4, 4)], requires_grad=True)
    amounts(rho, 4).sum().backward()
    assert float(rho.grad) == pytest.approx(4 * float(torch.sigmoid(rho.detach())))


# Heads


def layouts(config, model_class):
    with torch.device("meta"):
        model = model_class(config)
    return {
        name: tuple(head_layout(model, name, module, per_head=True))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def test_heads_of_llama_are_those_of_its_configuration(tiny_base_folder):
    model = base_model(tiny_base_folder)
    found = {name.rpartition(".")[2]: head_layout(model, name, model.get_submodule(name), per_head=True)
             for name in NAMES[:7]}  # fmt: skip
    assert {name: tuple(layout) for name, layout in found.items()} == {
        "q_proj": (4, "rows"), "k_proj": (2, "rows"), "v_proj": (2, "rows"), "o_proj": (4, "columns"),
        "gate_proj": (1, "rows"), "up_proj": (1, "rows"), "down_proj": (1, "rows"),
    }  # fmt: skip
    assert head_layout(model, NAMES[0], model.get_submodule(NAMES[0]), per_head=False).heads == 1


def test_heads_of_bert_t5_and_models_of_two_parts():
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, T5Config, T5Model

    bert = layouts(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64), BertModel
    )
    assert bert["encoder.layer.0.attention.self.query"] == (4, "rows")
    assert bert["encoder.layer.0.attention.output.dense"] == (4, "columns")
    assert bert["encoder.layer.0.intermediate.dense"] == bert["encoder.layer.0.output.dense"] == (1, "rows")
    t5 = layouts(T5Config(d_model=24, d_kv=8, num_heads=3, d_ff=24, num_layers=1, vocab_size=50), T5Model)
    assert t5["encoder.block.0.layer.0.SelfAttention.q"] == (3, "rows")
    assert t5["decoder.block.0.layer.1.EncDecAttention.o"] == (3, "columns")
    assert t5["encoder.block.0.layer.1.DenseReluDense.wi"] == (1, "rows")
    parts = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config={**parts, "num_attention_heads": 4}, vision_config={**parts, "num_attention_heads": 8}
    )
    clip = layouts(config, CLIPModel)
    assert clip["text_model.encoder.layers.0.self_attn.q_proj"] == (4, "rows")
    assert clip["vision_model.encoder.layers.0.self_attn.out_proj"] == (8, "columns")


# Registration


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_is_one_head_and_what_the_formula_says(kernel, tmp_path):
    """Against the convolution by W + s B diag(g) A in float64, open, pruned, and as stock PEFT's LoRA."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(6, 10, kernel, stride=2, padding=kernel // 2))
    stock = nn.Sequential(nn.Conv2d(6, 10, kernel, stride=2, padding=kernel // 2))
    stock.load_state_dict(base.state_dict())
    weight, bias = base[0].weight.detach().double(), base[0].bias.detach().double()
    model = get_peft_model(base, ArdLoraConfig(r=3, lora_alpha=6.0, target_modules=["0"]))
    layer = model.base_model.model[0]
    assert tuple(layer.layouts["default"]) == (1, "rows")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        layer.ard_rho["default"].fill_(rho_of_rank(2.5, 3))
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    assert a.shape == (6, 6, kernel, kernel)
    opened = torch.tensor([1, 1, 0.5, 0, 0, 0], dtype=torch.float64)
    delta = 2.0 * torch.einsum("or,r,rikl->oikl", b[:, :, 0, 0], opened, a)
    x = torch.randn(2, 6, 8, 8)
    expected = nn.functional.conv2d(x.double(), weight + delta, bias, stride=2, padding=kernel // 2)
    found = model(x)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    found.square().sum().backward()
    assert layer.ard_rho["default"].grad.abs().item() > 0
    assert model.base_model.prune() == {"0": [3]}
    assert (model(x) - expected).norm() < 1e-5 * expected.norm()
    config, tensors = to_lora(model)
    plain = get_peft_model(stock, LoraConfig(**{k: getattr(config, k) for k in
        ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")}))  # fmt: skip
    set_peft_model_state_dict(plain, tensors)
    assert (plain.eval()(x) - expected).norm() < 1e-5 * expected.norm()
    model.merge_and_unload()
    assert (model.base_model.model(x) - expected).norm() < 1e-5 * expected.norm()


def test_a_convolution_in_groups_is_refused_by_name():
    with pytest.raises(InputError, match=r"'a.b' \(Conv2d with groups, dilation or padding of its own\) is not"):
        require_adaptable("a.b", nn.Conv2d(4, 4, 3, groups=2))


def test_registering_again_changes_nothing():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    before = (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING))
    register()
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)) == before
    assert PeftType("ARD_LORA") is PeftType.ARD_LORA and PeftType.ARD_LORA == "ARD_LORA"
    assert PeftType.LORA.value == "LORA"


def test_commands_do_not_import_it():
    code = "import sys, haori.cli.app, haori.adapters; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# What is refused


@pytest.mark.parametrize(
    ("keys", "targets", "part"),
    [
        ({"warmup": 0.6, "settle": 0.5}, NAMES, "'method.warmup' (0.6) and 'method.settle' (0.5)"),
        ({}, ["model.embed_tokens"], "which 'model.embed_tokens' (Embedding) is not"),
        ({"modules_to_save": ("nowhere",)}, NAMES, "no module 'nowhere'"),
    ],
)
def test_a_method_that_does_not_go_with_the_base_is_refused(keys, targets, part, tiny_base_folder, tiny_tokenizer):
    skeleton = load_skeleton(find_base(str(tiny_base_folder)))
    with pytest.raises(InputError, match=re.escape(part)):
        check_method(skeleton, tiny_tokenizer, section(**keys), targets)
    check(skeleton, tiny_tokenizer, section(), NAMES)


def test_other_layers_are_refused_by_name(tiny_base_folder, tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16))
    with pytest.raises(InputError, match=r"which 'transformer.h.0.attn.c_attn' \(Conv1D\) is not; leave"):
        insert(gpt2, tiny_tokenizer, section(), ["transformer.h.0.attn.c_attn"], Insertion(1, 10))
    model = base_model(tiny_base_folder)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model.model.layers[0].self_attn.q_proj = bitsandbytes.nn.Linear4bit(64, 64, bias=False)
    with pytest.raises(InputError, match="quantised Linear4bit"):
        check(model, tiny_tokenizer, section(), NAMES)


def test_values_that_mean_nothing_are_refused(tiny_base_folder, tiny_tokenizer):
    with pytest.raises(InputError, match="positive rank"):
        ArdLoraConfig(r=0)
    with pytest.raises(InputError, match="must be numbers"):
        insert(base_model(tiny_base_folder), tiny_tokenizer, section(rank="auto"), NAMES, Insertion(1, 10))


def test_a_run_too_short_to_learn_ranks_is_refused(tiny_base_folder, tiny_tokenizer):
    model = inserted(tiny_base_folder, tiny_tokenizer)
    with pytest.raises(InputError, match="A run of 1 optimizer steps leaves ARD-LoRA none"):
        behaviour_of(model, section(), 1)


# Training


def test_ranks_rest_then_move_then_settle(tiny_base_folder, tiny_tokenizer):
    method = section(warmup=0.2, settle=0.3, gate_lr=0.2)
    model = inserted(tiny_base_folder, tiny_tokenizer, method)
    added = behaviour(model, method, 10)
    optimizer = optimizer_of(added)
    start = [rho.detach().clone() for rho in added.rhos]
    train(model, added, 2, optimizer)
    assert all(torch.equal(*pair) for pair in zip(added.rhos, start, strict=True))
    assert set(sum(added.ranks().values(), [])) == {4}
    train(model, added, 4, optimizer, first=3)
    low, high = bounds(4)
    assert not added.settled(6) and added.penalty() is not None
    assert all(low <= float(r) <= high for rho in added.rhos for r in rho.detach())
    assert any(float(t) % 1 for rho in added.rhos for t in amounts(rho.detach(), 4))
    train(model, added, 1, optimizer, first=7)
    ranks, rested = added.ranks(), [rho.detach().clone() for rho in added.rhos]
    assert added.settled(7) and added.penalty() is None and len(set(sum(ranks.values(), []))) > 1
    assert all(not float(t) % 1 for rho in rested for t in amounts(rho, 4))
    train(model, added, 3, optimizer, first=8)
    assert all(torch.equal(*pair) for pair in zip(added.rhos, rested, strict=True))
    live = run(model.eval())
    added.finish()
    assert added.ranks() == ranks and all(torch.equal(x, y) for x, y in zip(run(model), live, strict=True))


def test_the_penalty_shrinks_ranks_that_are_of_no_use(tiny_base_folder, tiny_tokenizer):
    method = section(warmup=0.0, settle=0.1, gate_lr=0.1, sparsity=1000.0)
    model = inserted(tiny_base_folder, tiny_tokenizer, method)
    added = behaviour(model, method, 20)
    train(model, added, 20, optimizer_of(added))
    assert set(sum(added.ranks().values(), [])) == {1}


def test_the_penalty_is_a_mean_over_heads(tiny_base_folder, tiny_tokenizer):
    method = section(warmup=0.0, sparsity=0.5, variation=0.1)
    for targets in (NAMES, NAMES[:3]):
        added = behaviour(inserted(tiny_base_folder, tiny_tokenizer, method, targets), method, 10)
        assert float(added.penalty().detach()) == pytest.approx(0.5)  # every a is 1 and has not changed
        with torch.no_grad():
            for rho in added.rhos:
                rho.copy_(torch.full_like(rho, rho_of_rank(2, 4)))
        assert float(added.penalty().detach()) == pytest.approx(0.5 * (0.5 + 0.1 * 0.5))


def test_rank_factors_have_their_own_rate_and_no_decay(tiny_base_folder, tiny_tokenizer):
    method = section(gate_lr=0.03)
    model = inserted(tiny_base_folder, tiny_tokenizer, method)
    rest, own = behaviour(model, method, 10).parameter_groups(0.1)
    assert (own["lr_peak"], own["weight_decay"]) == (0.03, 0.0) and len(own["params"]) == 14
    assert rest["weight_decay"] == 0.1 and "lr_peak" not in rest
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for group in (rest, own) for p in group["params"]) == trained


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_run_goes_on_exactly_where_it_stopped(stop, tiny_base_folder, tiny_tokenizer):
    method = section(warmup=0.2, settle=0.3, gate_lr=0.2)

    def begin():
        model = inserted(tiny_base_folder, tiny_tokenizer, method)
        added = behaviour(model, method, 10)
        return model, added, optimizer_of(added)

    straight, added, optimizer = begin()
    train(straight, added, 10, optimizer)
    before, kept, moments = begin()
    train(before, kept, stop, moments)
    after, resumed, going_on = begin()
    after.load_state_dict(before.state_dict())
    going_on.load_state_dict(moments.state_dict())
    resumed.load_state(kept.state())
    train(after, resumed, 10 - stop, going_on, first=stop + 1)
    pairs = zip(straight.parameters(), after.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs) and added.ranks() == resumed.ranks()


def test_at_rest_every_parameter_still_has_a_gradient(tiny_base_folder, tiny_tokenizer):
    model = inserted(tiny_base_folder, tiny_tokenizer)
    behaviour(model, section(), 10)
    ids = torch.tensor([PROBES[0]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert not any(p.grad.any() for name, p in model.named_parameters() if "ard_rho" in name)


# Storing


def test_a_16_bit_base_does_not_round_the_rank_factors(tiny_base_folder):
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    config = ArdLoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.bfloat16), config)
    rho = next(m for m in model.modules() if isinstance(m, ArdLoraLayer)).ard_rho["default"]
    assert rho.dtype is torch.float32 and open_ranks(rho, 3) == [3] * 4
    assert isinstance(model, PeftModel)


def test_a_folder_without_rank_factors_that_is_not_pruned_is_refused(tiny_base_folder, tiny_tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_stock(inserted(tiny_base_folder, tiny_tokenizer), tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "rho" not in key}, path)
    with pytest.raises(MismatchError, match="lacks the tensor"):
        stock_logits(tiny_base_folder, folder)


def test_ranks_of_other_modules_are_refused(tiny_base_folder, tiny_tokenizer, tmp_path):
    model = inserted(tiny_base_folder, tiny_tokenizer)
    model.base_model.prune()
    folder = save_stock(model, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["head_ranks"][NAMES[3]]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=re.escape(f"holds no ranks for {NAMES[3]!r}")):
        stock_logits(tiny_base_folder, folder)


def test_only_ard_lora_is_converted(tiny_base_folder, tmp_path):
    with pytest.raises(InputError, match="The adapter is a LORA"):
        to_lora(stock_lora(tiny_base_folder, tmp_path / "a"))
    with pytest.raises(FileFormatError, match="holds no readable adapter"):
        to_lora(tmp_path / "nowhere")


def test_heads_that_need_more_get_more(tiny_base_folder, tiny_tokenizer):
    """A teacher changes the four heads of a query projection by matrices of rank 8, 4, 1 and 0."""
    method = section(gate_lr=0.1)
    model = inserted(tiny_base_folder, tiny_tokenizer, method, NAMES[:1])
    layer = next(module for module in model.modules() if isinstance(module, ArdLoraLayer))
    numbers = torch.Generator().manual_seed(1)
    teacher = torch.cat(
        [torch.randn(16, k, generator=numbers) @ torch.randn(k, 64, generator=numbers) * 0.05 for k in (8, 4, 1, 0)]
    )
    added = behaviour(model, method, 100)
    optimizer = optimizer_of(added)
    for step in range(1, 101):
        x = torch.randn(64, 64, generator=numbers)
        loss = (layer(x) - x @ (layer.base_layer.weight + teacher).T).square().mean()
        if (penalty := added.penalty()) is not None:
            loss = loss + penalty
        loss.backward()
        optimizer.step()
        added.after_step(step)
        optimizer.zero_grad()
    first, second, third, fourth = added.ranks()[NAMES[0]]
    assert first > 4 > fourth and first >= second > third and fourth == 1
