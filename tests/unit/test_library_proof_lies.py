"""The proof against planted faults: whatever does a tenth more or less than the adapter must fail, at any size."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import DoraLinearVariant

from haori.bases import find_base, load_model, load_tokenizer
from haori.core.errors import VerificationError
from haori.core.quantization import Quantization
from haori.library import default_probes, live_probe_logits, merge_adapter, verify_adapter, verify_model
from haori.library.proof.exact import exact_logits
from tests.library_samples import change_tensors, save_stock, stock_lora

HONEST_DELTA = Linear.get_delta_weight
SIZES = {"tiny": 1e-5, "usual": 1.0, "huge": 1e3}
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32}},
}


def _scaled(factor):
    return lambda layer, delta: factor * delta


def _one_missing(layer, delta):
    return delta * 0 if layer.of_layer_1_v else delta


def _transposed(layer, delta):
    return delta.T if delta.shape[0] == delta.shape[1] else delta


def _without_root(layer, delta):
    """The scale of the other convention: alpha / r for alpha / sqrt(r), and the reverse."""
    rank = layer.r["default"]
    return delta * rank**0.5 if not layer.use_rslora["default"] else delta / rank**0.5


LIES = {
    "0.9": _scaled(0.9), "1.1": _scaled(1.1), "half": _scaled(0.5), "nothing": _scaled(0.01), "sign": _scaled(-1.0),
    "slightly against": _scaled(-0.05), "one module missing": _one_missing, "transposed": _transposed,
    "other scale": _without_root,
}  # fmt: skip


def plant(monkeypatch, lie):
    """Let PEFT merge a lie; what the layers compute unmerged stays the truth."""

    def lying(self, adapter):
        self.of_layer_1_v = self.out_features == 32 and self.get_base_layer() is not None and _is_marked(self)
        return lie(self, HONEST_DELTA(self, adapter))

    monkeypatch.setattr(Linear, "get_delta_weight", lying)


def _is_marked(layer) -> bool:
    """The first v_proj that asks is the one that is left out: its A is remembered."""
    first = _MARKED.setdefault("A", layer.lora_A["default"].weight)
    return first is layer.lora_A["default"].weight


_MARKED: dict[str, torch.Tensor] = {}


@pytest.fixture(autouse=True)
def nothing_marked():
    _MARKED.clear()


@pytest.fixture(scope="module")
def adapters(tiny_base_folder, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        kind: stock_lora(tiny_base_folder, root / kind, **{"target_modules": "all-linear", **options})
        for kind, options in KINDS.items()
    }


def sized(folder: Path, size: float, out: Path) -> Path:
    """Copy an adapter with an update of another size."""

    def change(tensors):
        for key in tensors:
            if "lora_B" in key:
                tensors[key] = tensors[key] * size

    return change_tensors(Path(shutil.copytree(folder, out)), change)


def failures(verification) -> list[str]:
    return [check.name for check in verification.failures]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_lie_about_the_merge_fails(kind, dtype, size, adapters, tiny_base_folder, tmp_path, monkeypatch):
    base = find_base(str(tiny_base_folder))
    if kind == "dora" and size != "usual":
        pytest.skip("its magnitude is most of the effect, whatever the size of B A")
    folder = sized(adapters[kind], SIZES[size], tmp_path / "sized")
    assert failures(verify_adapter(base, folder, dtype=dtype)) == []
    for name, lie in LIES.items():
        if kind == "dora" and name in {"nothing", "slightly against"}:
            continue  # the magnitude, which is no part of this lie, is most of the effect
        _MARKED.clear()
        plant(monkeypatch, lie)
        assert failures(verify_adapter(base, folder, dtype=dtype)) == ["merge"], name


def test_a_magnitude_that_is_not_merged_fails(adapters, tiny_base_folder, monkeypatch):
    def plain(module, active_adapter, orig_weight):
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    monkeypatch.setattr(DoraLinearVariant, "merge_safe", staticmethod(plain))
    base = find_base(str(tiny_base_folder))
    for dtype in ("fp32", "fp16", "bf16"):
        assert failures(verify_adapter(base, adapters["dora"], dtype=dtype)) == ["merge"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lie", ["0.9", "sign", "one module missing"])
def test_lies_about_merging_what_was_trained_over_a_quantised_base(bits, lie, adapters, tiny_base_folder, monkeypatch):
    pytest.importorskip("bitsandbytes")
    base = find_base(str(tiny_base_folder))
    options = {"dtype": "bf16", "quantization": Quantization(bits)}
    assert failures(verify_adapter(base, adapters["lora"], **options)) == []
    plant(monkeypatch, LIES[lie])
    assert failures(verify_adapter(base, adapters["lora"], **options)) == ["merge"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_honest_merges_pass_whatever_the_seed_and_size(dtype, tiny_base_folder, tmp_path):
    base = find_base(str(tiny_base_folder))
    for seed in range(8):
        options = list(KINDS.values())[seed % len(KINDS)]
        folder = stock_lora(
            tiny_base_folder, tmp_path / f"{seed}", seed=seed, **{"target_modules": "all-linear", **options}
        )
        for size in (1e-6, 1e-3, 1.0, 1e3):
            found = verify_adapter(base, sized(folder, size, tmp_path / f"{seed}-{size}"), dtype=dtype)
            assert found.passed, (seed, size, found.failures)


def test_weights_that_change_after_the_proof_fail(adapters, tiny_base_folder, tmp_path, monkeypatch):
    from peft.tuners.lora import LoraModel

    honest = LoraModel.merge_and_unload

    def lying(self, *args, **kwargs):
        model = honest(self, *args, **kwargs)
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 2**-6
        return model

    monkeypatch.setattr(LoraModel, "merge_and_unload", lying)
    base = find_base(str(tiny_base_folder))
    for dtype in ("fp32", "fp16", "bf16"):
        found = verify_adapter(base, adapters["lora"], dtype=dtype)
        assert failures(found) == ["merge"] and "up_proj" in found.failures[0].detail


def test_a_written_model_that_is_not_the_merged_one_is_not_kept(adapters, tiny_base_folder, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    honest = LlamaForCausalLM.save_pretrained

    def lying(self, *args, **kwargs):
        self.model.layers[0].self_attn.k_proj.weight.data.mul_(1 + 2**-7)
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lying)
    with pytest.raises(VerificationError, match=r"not the merged ones, first.*k_proj"):
        merge_adapter(find_base(str(tiny_base_folder)), adapters["lora"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_written_configuration_that_computes_otherwise_is_not_kept(adapters, tiny_base_folder, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    honest = LlamaForCausalLM.save_pretrained

    def lying(self, *args, **kwargs):
        self.config.rms_norm_eps = 1e-4
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lying)
    with pytest.raises(VerificationError, match="written model's logits differ"):
        merge_adapter(find_base(str(tiny_base_folder)), adapters["lora"], tmp_path / "out")


def test_an_effect_that_rounding_takes_away_whole_is_refused_with_advice(adapters, tiny_base_folder, tmp_path):
    folder = sized(adapters["lora"], 1e-12, tmp_path / "sized")
    with pytest.raises(VerificationError, match="the weights are the base's own; use fp16"):
        merge_adapter(find_base(str(tiny_base_folder)), folder, tmp_path / "out", dtype="bf16")


def test_exact_logits_are_those_of_the_model_in_float64(tiny_base_folder, adapters):
    base = find_base(str(tiny_base_folder))
    probes = default_probes(load_tokenizer(base))
    model = load_model(base, dtype="bf16")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = exact_logits(model, probes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    wide = model.double()
    for probe, logits in zip(probes, found, strict=True):
        with torch.no_grad():
            wanted = wide(input_ids=torch.tensor([probe])).logits[0, -8:]
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)  # its norms compute in fp32


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [0.9, 1.1, 0.5, -1.0])
def test_an_adapter_saved_at_another_strength_fails_to_reload(dtype, factor, tiny_base_folder, tmp_path):
    for size in (1e-2, 1.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = find_base(str(tiny_base_folder))
            config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
            live = get_peft_model(load_model(base, dtype=dtype), config)
        for seed, (name, parameter) in enumerate(live.named_parameters()):
            if "lora_B" in name:
                draw = torch.Generator().manual_seed(seed)
                parameter.data = size * torch.randn(parameter.shape, generator=draw)
        probes = default_probes(load_tokenizer(base))
        logits = live_probe_logits(live, probes)
        folder = save_stock(live, tmp_path / f"adapter-{size}")
        options = {"dtype": dtype, "probes": probes, "live_logits": logits}
        assert failures(verify_adapter(base, folder, **options)) == []
        lie = sized(folder, factor, tmp_path / f"lie-{size}")
        assert failures(verify_adapter(base, lie, **options)) == ["reload"]


def test_a_model_trained_in_full_that_is_a_tenth_off_fails(tiny_base_folder, tmp_path):
    base = find_base(str(tiny_base_folder))
    for size in (1e-4, 1e-2):
        model = load_model(base, dtype="fp32")
        original = {name: value.detach().clone() for name, value in model.named_parameters()}
        for seed, value in enumerate(model.parameters()):
            value.data += size * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        probes = default_probes(load_tokenizer(base))
        live = live_probe_logits(model, probes)
        out = tmp_path / f"model-{size}"
        for name, value in model.named_parameters():
            value.data = original[name] + 0.9 * (value.data - original[name])
        model.save_pretrained(out)
        load_tokenizer(base).save_pretrained(out)
        assert failures(verify_model(base, out, dtype="fp32", probes=probes, live_logits=live)) == ["reload"]


def test_one_module_without_an_update_is_named_and_kept(adapters, tiny_base_folder, tmp_path):
    folder = Path(shutil.copytree(adapters["lora"], tmp_path / "copy"))

    def change(tensors):
        for key in tensors:
            if "layers.1" in key and "lora_B" in key and "k_proj" in key:
                tensors[key] = tensors[key] * 0

    change_tensors(folder, change)
    found = verify_adapter(find_base(str(tiny_base_folder)), folder, dtype="bf16")
    delta = next(check for check in found.checks if check.name == "delta")
    assert found.passed
    assert "13 of 14 modules changed" in delta.detail
    assert "not changed at all: 'model.layers.1.self_attn.k_proj'" in delta.detail
