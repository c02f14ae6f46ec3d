"""What the engine multiplies against what stock PEFT computes: the output of every module, and logits."""

import copy
import json
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from haori.adapters.ard_lora import ArdLoraConfig
from haori.adapters.ard_lora.gates import rho_of_rank
from haori.core.errors import FileFormatError, InputError, MismatchError
from haori.library import inspect_adapter
from haori.library.target_modules import TargetModules
from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate, read_adapter_weights
from tests.library_samples import change_tensors, run, save_stock, stock_lora, stock_model, written_adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ID = f"sha256:{'0123456789abcdef' * 4}"
FIRST = "model.layers.0.self_attn.q_proj"


class StateDict:
    """The base's tensors, from a transformers model."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.state = dict(self.model.named_parameters(remove_duplicate=False))
        self.modules = dict(self.model.named_modules())

    @property
    def names(self):
        return self.state.keys()

    def linear(self, name: str) -> tuple[int, int] | None:
        module = self.modules.get(name)
        return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None

    tables = ()  # that the embedding and the head may be changed whole is tested with the runners

    def weight(self, module: str) -> torch.Tensor:
        return self.state[f"{module}.weight"]

    def tensor(self, name: str) -> torch.Tensor:
        return self.state[name]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-qwen")
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base_folder(request, tiny_base_folder, qwen) -> Path:
    return {"llama": tiny_base_folder, "qwen": qwen}[request.param]


def lora(**options: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **options}
    return LoraConfig(**settings)


def adalora(**options: Any) -> AdaLoraConfig:
    settings = {"init_r": 6, "target_r": 4, "lora_alpha": 16, "target_modules": ALL, "total_step": 10, **options}
    return AdaLoraConfig(task_type="CAUSAL_LM", **settings)


METHODS = {
    "lora": lora(),
    "regex": lora(target_modules=r".*\.layers\.1\..*(q|down)_proj", exclude_modules=["gate_proj"]),
    "one_layer": lora(layers_to_transform=[1]),
    "rslora": lora(use_rslora=True),
    "patterns": lora(
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp.*": 3, "v_proj": 1},
        alpha_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 5, "down_proj": 40},
    ),
    "rslora_patterns": lora(use_rslora=True, rank_pattern={"o_proj": 7}, alpha_pattern={"o_proj": 3}),
    "dora": lora(use_dora=True),
    "dora_rslora_patterns": lora(use_dora=True, use_rslora=True, rank_pattern={"v_proj": 2}),
    "norms": lora(modules_to_save=["norm", "input_layernorm"]),
    "tokens": lora(trainable_token_indices=[3, 7, 11, 200]),
    "tokens_by_name": lora(trainable_token_indices={"embed_tokens": [30, 5]}, target_modules=["q_proj"]),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "mica": lora(init_lora_weights="mica"),
    "adalora": adalora(),
    "adalora_no_alpha": adalora(lora_alpha=0),
    "head": lora(target_modules=["lm_head", "q_proj"]),
    "ard": ArdLoraConfig(r=3, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM"),
}
WITH_BIASES = {
    "lora_bias": lora(lora_bias=True),
    "bias_lora_only": lora(bias="lora_only"),
    "bias_all": lora(bias="all", target_modules=["q_proj", "down_proj"]),
    "dora_biases": lora(use_dora=True, bias="all"),
    "tokens_of_both": lora(trainable_token_indices={"embed_tokens": [30, 5], "lm_head": [9]}),
}
GRID = [(base, name, METHODS[name]) for base in ("llama", "qwen") for name in METHODS]
GRID += [("qwen", name, config) for name, config in WITH_BIASES.items()] + [
    ("llama", "lora_bias", lora(lora_bias=True))
]


def written(base: Path, folder: Path, config: Any) -> Path:
    model = stock_model(base, copy.deepcopy(config), scale=0.3)  # PEFT writes into configurations
    for name, parameter in model.named_parameters():
        if "ard_rho" in name:
            ranks = [1 + i % 5 for i in range(len(parameter))]
            parameter.data = torch.tensor([rho_of_rank(rank - 0.3, 3) for rank in ranks])
    return save_stock(model, folder)


def read(folder: Path, base: StateDict, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    return read_adapter_weights(inspect_adapter(folder), base, adapter=ID, dtype=dtype)


def stock(base: Path, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def output(linear: nn.Linear, update: ModuleUpdate, x: torch.Tensor) -> torch.Tensor:
    y = x @ linear.weight.T
    if update.output_scale is not None:
        y = y * update.output_scale
    if linear.bias is not None:
        y = y + linear.bias
    if update.a is not None:
        y = y + x @ update.a.T @ update.b
    return y if update.bias is None else y + update.bias


@torch.no_grad()
def fold(model: Any, weights: AdapterWeights) -> Any:
    """Write an adapter into a model's own weights."""
    for name, update in weights.updates.items():
        linear = model.get_submodule(name)
        if name == "lm_head":
            linear.weight = nn.Parameter(linear.weight.clone())
        if update.output_scale is not None:
            linear.weight *= update.output_scale[:, None]
        if update.a is not None:
            linear.weight += update.b.T @ update.a
        if update.bias is not None:
            held = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
            linear.bias = nn.Parameter(held + update.bias)
    for name, difference in weights.vectors.items():
        model.get_parameter(name).add_(difference)
    for name, (ids, rows) in weights.token_rows.items():
        model.get_parameter(name)[ids] += rows
    return model


@pytest.mark.parametrize(("base_folder", "name", "config"), GRID, ids=[f"{b}-{n}" for b, n, _ in GRID],
                         indirect=["base_folder"])  # fmt: skip
def test_equals_stock_peft(base_folder, tmp_path, name, config):
    folder = written(base_folder, tmp_path / "adapter", config)
    base = StateDict(base_folder)
    weights = read(folder, base)
    peft_model = stock(base_folder, folder)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    for module_name, update in weights.updates.items():
        linear = base.model.get_submodule(module_name)
        inputs = x[:, : linear.in_features]
        with torch.no_grad():
            expected = peft_model.get_base_model().get_submodule(module_name)(inputs)
            torch.testing.assert_close(output(linear, update, inputs), expected, rtol=1e-5, atol=1e-5)
    adapted = {n for n, m in peft_model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted <= set(weights.updates)
    changed, plain = run(peft_model), run(base.model)
    assert max(float((a - b).abs().max()) for a, b in zip(changed, plain, strict=True)) > 0.01
    for ours, theirs in zip(run(fold(base.model, weights)), changed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_true_ranks_and_layout(tiny_base_folder, tmp_path):
    folder = written(tiny_base_folder, tmp_path / "adapter", METHODS["patterns"])
    weights = read(folder, StateDict(tiny_base_folder), torch.bfloat16)
    assert weights.id == ID
    update = weights.updates[FIRST]
    assert update.a.shape == (2, 64) and update.b.shape == (2, 64)
    assert weights.updates["model.layers.1.mlp.up_proj"].a.shape == (3, 64)
    held = [t for u in weights.updates.values() for t in (u.a, u.b)]
    assert all(t.dtype == torch.bfloat16 for t in held)
    assert weights.size_bytes == sum(t.numel() * 2 for t in held)
    assert sum(t.untyped_storage().nbytes() for t in held) == weights.size_bytes  # nothing more is kept alive


def test_vectors_of_a_dora_stay_in_fp32(tiny_base_folder, tmp_path):
    folder = written(tiny_base_folder, tmp_path / "adapter", METHODS["dora"])
    update = read(folder, StateDict(tiny_base_folder), torch.bfloat16).updates[FIRST]
    assert update.output_scale.dtype == torch.float32 and update.b.dtype == torch.bfloat16


def test_scale_is_rounded_once(tiny_base_folder, tmp_path):
    folder = stock_lora(tiny_base_folder, tmp_path / "adapter", lora_alpha=7, r=3)
    base = StateDict(tiny_base_folder)
    exact, rounded = read(folder, base), read(folder, base, torch.bfloat16)
    for name, update in exact.updates.items():
        assert torch.equal(update.b.bfloat16(), rounded.updates[name].b)


def test_pruned_ranks_of_adalora_take_no_room(tiny_base_folder, tmp_path):
    def prune(tensors):
        tensors[f"base_model.model.{FIRST}.lora_E"][[1, 4]] = 0
        tensors["base_model.model.model.layers.0.mlp.up_proj.lora_E"][:] = 0

    folder = change_tensors(written(tiny_base_folder, tmp_path / "adapter", METHODS["adalora"]), prune)
    base = StateDict(tiny_base_folder)
    weights = read(folder, base)
    assert weights.updates[FIRST].a.shape[0] == 4
    assert "model.layers.0.mlp.up_proj" not in weights.updates
    for ours, theirs in zip(run(fold(base.model, weights)), run(stock(tiny_base_folder, folder)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_cut_ranks_of_adalora(tiny_base_folder, tmp_path):
    model = stock_model(tiny_base_folder, copy.deepcopy(METHODS["adalora"]), scale=0.3)
    names = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    pattern = {name: [(i + j) % 3 != 0 for j in range(6)] for i, name in enumerate(names)}
    pattern[names[0]] = [False] * 6
    model.peft_config["default"].rank_pattern = pattern
    folder = save_stock(model, tmp_path / "adapter")
    base = StateDict(tiny_base_folder)
    weights = read(folder, base)
    assert sorted({update.a.shape[0] for update in weights.updates.values()}) == [4]
    for ours, theirs in zip(run(fold(base.model, weights)), run(stock(tiny_base_folder, folder)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_pruned_ard_lora(tiny_base_folder, tmp_path):
    model = stock_model(tiny_base_folder, copy.deepcopy(METHODS["ard"]), scale=0.3)
    for name, parameter in model.named_parameters():
        if "ard_rho" in name:
            parameter.data = torch.tensor([rho_of_rank(1 + i % 5, 3) for i in range(len(parameter))])
    model.base_model.prune()
    folder = save_stock(model, tmp_path / "adapter")
    base = StateDict(tiny_base_folder)
    for ours, theirs in zip(run(fold(base.model, read(folder, base))), run(stock(tiny_base_folder, folder)),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_in_16_and_8_bits(tiny_base_folder, tmp_path, dtype):
    def cast(tensors):
        for key, value in tensors.items():
            tensors[key] = value.to(dtype)

    folder = change_tensors(stock_lora(tiny_base_folder, tmp_path / "adapter"), cast)
    base = StateDict(tiny_base_folder)
    for ours, theirs in zip(run(fold(base.model, read(folder, base))), run(stock(tiny_base_folder, folder)),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


REFUSED = {
    "ia3": (IA3Config(task_type="CAUSAL_LM"), "of the method ia3"),
    "embedding": (lora(target_modules=["embed_tokens", "q_proj"]), "lora_embedding_A.*haori merge"),
    "head_saved": (lora(modules_to_save=["lm_head"]), "whole of 'lm_head.weight', changed, which.*haori merge"),
    "embedding_saved": (lora(modules_to_save=["embed_tokens"]), "whole of 'model.embed_tokens.weight'"),
    "pissa": (lora(init_lora_weights="pissa"), "its start 'pissa' had changed"),
    "pissa_quick": (lora(init_lora_weights="pissa_niter_4"), "its start 'pissa_niter_4' had changed"),
    "olora": (lora(init_lora_weights="olora"), "its start 'olora' had changed"),
    "replicated": (lora(layer_replication=[[0, 2], [1, 2]]), "replicated layers"),
    "activated": (lora(alora_invocation_tokens=[3, 4]), "activated LoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(tiny_base_folder, tmp_path, kind):
    config, said = REFUSED[kind]
    folder = written(tiny_base_folder, tmp_path / "adapter", config)
    with pytest.raises(InputError, match=f"'0123456789ab'.*{said}"):
        read(folder, StateDict(tiny_base_folder))


@pytest.mark.parametrize("field", ["kasa_config", "use_bdlora", "use_qalora", "target_parameters", "velora_config"])
def test_variants_refused_by_name(tiny_base_folder, tmp_path, field):
    folder = written_adapter(tmp_path / "adapter", **{field: {"x": 1}})
    with pytest.raises(InputError, match="does not serve that"):
        read(folder, StateDict(tiny_base_folder))


def without(key):
    return lambda tensors: tensors.pop(next(k for k in tensors if key in k))


def added(key, tensor):
    return lambda tensors: tensors.__setitem__(key, tensor)


def set_first(value):
    def change(tensors):
        next(iter(tensors.values()))[0, 0] = value

    return change


def zero_all(tensors):
    for key, value in tensors.items():
        if "lora_B" in key:
            value.zero_()


BROKEN = {
    "no_b": (without("lora_B"), MismatchError, "only one of the two factors"),
    "unknown_part": (added(f"base_model.model.{FIRST}.lora_C.weight", torch.ones(2, 2)), InputError, "lora_C"),
    "unknown_module": (
        added("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", torch.ones(4, 64)),
        MismatchError,
        "no module 'model.layers.9.self_attn.q_proj'",
    ),
    "norm_of_another_size": (added("base_model.model.model.norm.weight", torch.ones(63)), MismatchError, "the base's"),
    "no_prefix": (added(f"{FIRST}.lora_A.weight", torch.ones(4, 64)), MismatchError, "does not begin with"),
    "bias_without_one": (added(f"base_model.model.{FIRST}.base_layer.bias", torch.ones(64)), MismatchError, "has none"),
    "whole_numbers": (
        added("base_model.model.model.norm.weight", torch.ones(64).int()), FileFormatError, "dtype I32",
    ),
    "magnitude": (
        added(f"base_model.model.{FIRST}.lora_magnitude_vector", torch.ones(64)), MismatchError, "magnitude vector",
    ),
    "nan": (set_first(float("nan")), FileFormatError, "NaN or infinity in"),
    "infinity": (set_first(float("-inf")), FileFormatError, "NaN or infinity in"),
    "zero": (zero_all, InputError, "does nothing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_never_half_applied(tiny_base_folder, tmp_path, kind):
    change, error, said = BROKEN[kind]
    folder = change_tensors(stock_lora(tiny_base_folder, tmp_path / "adapter"), change)
    with pytest.raises(error, match=said):
        read(folder, StateDict(tiny_base_folder))


def test_a_missing_module_is_noticed(tiny_base_folder, tmp_path):
    def drop(tensors):
        for key in [key for key in tensors if "layers.1.self_attn.v_proj" in key]:
            del tensors[key]

    folder = change_tensors(stock_lora(tiny_base_folder, tmp_path / "adapter"), drop)
    with pytest.raises(MismatchError, match=r"adapts 'model.layers.1.self_attn.v_proj', for which its file"):
        read(folder, StateDict(tiny_base_folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 8}, "the rank 8"),
        ({"r": "many"}, "whole number"),
        ({"lora_alpha": None}, "a number from 0"),
        ({"target_modules": ["q_proj"]}, "does not adapt 'model.layers.0.self_attn.v_proj'"),
        ({"target_modules": None}, "does not adapt 'model.layers.0.self_attn.q_proj'"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "does not adapt 'model.layers.1.self_attn.q_proj'"),
        ({"layers_to_transform": [0]}, "does not adapt 'model.layers.1.self_attn.q_proj'"),
        ({"modules_to_save": ["q_proj"]}, "does not adapt 'model.layers.0.self_attn.q_proj'"),
        ({"target_modules": "all-linear"}, "adapts 'model.layers.0.(self_attn|mlp)"),
        ({"target_modules": ["q_proj", "v_proj", "norm"]}, "adapts 'model.norm', for which"),
        ({"target_modules": ["q_proj", "v_proj", "mlp"]}, "adapts 'model.layers.0.mlp', for which"),
        ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "adapts 'model.embed_tokens', for which"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "trains tokens of 'embed_tokens'"),
        ({"modules_to_save": ["norm"]}, "saves .* whole"),
        ({"trainable_token_indices": [3]}, "trains tokens"),
        ({"use_dora": True}, "magnitude vector"),
        ({"lora_bias": True}, "has a bias"),
        ({"modules_to_save": ["nothing"]}, "saves 'nothing' whole"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "adapts 'model.layers.0.self_attn.o_proj'"),
    ],
)
def test_a_configuration_that_does_not_go_with_its_file(tiny_base_folder, tmp_path, change, said):
    folder = stock_lora(tiny_base_folder, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=said):
        read(folder, StateDict(tiny_base_folder))


TARGETS = st.lists(
    st.sampled_from(["q_proj", "self_attn.q_proj", "model.layers.1.mlp.up_proj", "proj", "mlp", "1.mlp.up_proj"]),
    min_size=1, max_size=3,
)  # fmt: skip
EXPRESSIONS = st.sampled_from([".*q_proj", r"model\.layers\.[01]\..*proj", "q_proj", r".*\.(up|down)_proj"])
NAMED = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
    "model.layers.1.mlp.experts.0.up_proj",
    "encoder.layer.1.q_proj",
    "model.norm",
    "q_proj",
    "model.layers.0.mlp",
]


@settings(max_examples=500, deadline=None)
@given(targets=TARGETS | EXPRESSIONS, excluded=st.none() | TARGETS | EXPRESSIONS, saved=st.none() | TARGETS,
       layers=st.none() | st.integers(0, 1) | st.lists(st.integers(0, 1), max_size=2),
       pattern=st.sampled_from([None, [], "layers", ["layer", "layers"], ["experts"]]))  # fmt: skip
def test_modules_are_chosen_as_by_peft(targets, excluded, saved, layers, pattern):
    from peft.tuners.tuners_utils import check_target_module_exists

    config = {"target_modules": targets, "exclude_modules": excluded, "modules_to_save": saved}
    if not isinstance(targets, str):
        config |= {"layers_to_transform": layers, "layers_pattern": pattern if layers is not None else None}
    theirs = SimpleNamespace(**config)
    for name in NAMED:
        found = TargetModules(config).has(name, in_all_linear=False)
        assert found == bool(check_target_module_exists(theirs, name)), name


def test_a_bias_that_peft_would_ignore(tiny_base_folder, qwen, tmp_path):
    def change(tensors):
        key = next(key for key in tensors if key.endswith("q_proj.base_layer.bias"))
        tensors[key.replace(".base_layer.", ".")] = tensors.pop(key)

    folder = change_tensors(written(qwen, tmp_path / "adapter", lora(bias="lora_only")), change)
    with pytest.raises(MismatchError, match="PEFT would ignore its tensor"):
        read(folder, StateDict(qwen))


def test_a_base_of_another_size(tiny_base_folder, qwen, tmp_path):
    folder = stock_lora(tiny_base_folder, tmp_path / "adapter")
    with pytest.raises(MismatchError, match="does not match rank 4 and the base's 32 inputs"):
        read(folder, StateDict(qwen))


@pytest.mark.parametrize("ids", [[3, 3], [3, -1], [3, 4000], [3], "all"])
def test_tokens_that_do_not_fit(tiny_base_folder, tmp_path, ids):
    folder = written(tiny_base_folder, tmp_path / "adapter", lora(trainable_token_indices=[3, 7]))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": ids}))
    with pytest.raises(MismatchError, match="token"):
        read(folder, StateDict(tiny_base_folder))


def test_a_file_that_changed_since_it_was_inspected(tiny_base_folder, tmp_path):
    folder = stock_lora(tiny_base_folder, tmp_path / "adapter")
    files = inspect_adapter(folder)
    whole = files.weights.read_bytes()
    base = StateDict(tiny_base_folder)
    for content in (whole[:-100], whole + struct.pack("f", 1.0), b""):
        files.weights.write_bytes(content)
        with pytest.raises(FileFormatError, match="changed while it was read"):
            read_adapter_weights(files, base, adapter=ID, dtype=torch.float32)
    files.weights.unlink()
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_adapter_weights(files, base, adapter=ID, dtype=torch.float32)


def test_rank_factors_that_do_not_fit(tiny_base_folder, tmp_path):
    def change(tensors):
        key = next(key for key in tensors if key.endswith("ard_rho"))
        tensors[key] = torch.ones(7)

    folder = change_tensors(written(tiny_base_folder, tmp_path / "adapter", METHODS["ard"]), change)
    with pytest.raises(FileFormatError, match="rank factors of the adapter '0123456789ab' do not fit"):
        read(folder, StateDict(tiny_base_folder))
