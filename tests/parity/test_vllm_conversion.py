"""Adapters as they are written for vLLM against the originals: the same logits in stock PEFT."""

import os
import time
import warnings

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from haori.bases import find_base
from haori.core.errors import InputError
from haori.library import inspect_adapter
from haori.serve.vllm.conversion import VllmCopies, vllm_name
from haori.serve.vllm.opening import _inspect
from tests.library_samples import run, save_stock, stock_logits, stock_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **options})


SERVED = {
    "plain": lora(),
    "rslora": lora(use_rslora=True, target_modules=["q_proj", "down_proj"], task_type=None),
    "patterns": lora(rank_pattern={"q_proj": 2, "v_proj": 7}, alpha_pattern={"down_proj": 40}),
    "adalora": AdaLoraConfig(
        init_r=6, target_r=4, lora_alpha=16, target_modules=ALL, total_step=10, task_type="CAUSAL_LM"
    ),
}
REFUSED = {
    "DoRA": lora(use_dora=True),
    "bias": lora(lora_bias=True),
    "norm": lora(modules_to_save=["norm"]),
    "trained tokens": lora(trainable_token_indices=[3, 7]),
}
IDS = {name: f"sha256:{number:064x}" for number, name in enumerate([*SERVED, *REFUSED])}


@pytest.fixture(scope="module")
def originals(tiny_base_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    models = {**SERVED, **REFUSED}
    return {
        name: save_stock(stock_model(tiny_base_folder, config, seed=seed, scale=0.2), root / name.replace(" ", "-"))
        for seed, (name, config) in enumerate(models.items())
    }


@pytest.fixture
def copies(tiny_base_folder, originals, tmp_path):
    base = find_base(str(tiny_base_folder))
    from haori.bases import load_tokenizer

    tensors, stops, vocabulary = _inspect(base, load_tokenizer(base))
    assert (stops, vocabulary) == (frozenset({2}), len(load_tokenizer(base)))
    folders = {IDS[name]: folder for name, folder in originals.items()}
    return VllmCopies(tmp_path / "copies", lambda adapter: inspect_adapter(folders[adapter]), tensors, 16)


@pytest.mark.parametrize("name", SERVED)
def test_a_copy_is_plain_lora_with_the_same_logits(tiny_base_folder, originals, copies, name):
    folder = copies.folder(((IDS[name], 1.0),))
    found, wanted = stock_logits(tiny_base_folder, folder), stock_logits(tiny_base_folder, originals[name])
    files = inspect_adapter(folder)
    assert files.peft_type == "LORA"
    assert files.config["task_type"] == inspect_adapter(originals[name]).config["task_type"]
    assert len(set(files.ranks.values())) == 1  # vLLM before 0.32 knows no patterns
    assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & files.config.keys()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_a_blend_is_the_sum_of_its_parts(tiny_base_folder, originals, copies):
    mix = ((IDS["plain"], 0.7), (IDS["patterns"], -1.5))
    found = stock_logits(tiny_base_folder, copies.folder(mix))
    blended = AutoModelForCausalLM.from_pretrained(tiny_base_folder).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for name, strength in (("plain", 0.7), ("patterns", -1.5)):
            adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base_folder), originals[name])
            for key, module in adapted.base_model.model.named_modules():
                if hasattr(module, "get_delta_weight"):
                    blended.get_submodule(key).weight += strength * module.get_delta_weight("default")
    for one, other in zip(found, run(blended), strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_does_not_apply_is_refused_by_name(copies, name):
    with pytest.raises(InputError, match=rf"holds .*{'token' if 'token' in name else name}.*haori merge"):
        copies.folder(((IDS[name], 1.0),))
    assert not [path for path in copies.root.iterdir() if not path.name.startswith(".")]


def test_a_rank_that_vllm_was_not_started_for_is_refused_before_vllm_sees_it(copies):
    mix = tuple((IDS[name], 1.0) for name in ("plain", "rslora", "patterns", "adalora"))
    with pytest.raises(InputError, match=r"The blend .* takes rank 18; .*--vllm-arg=--max-lora-rank=32"):
        copies.folder(mix)
    copies.largest_rank = None
    folder = copies.folder(mix)  # vLLM itself will say
    copies.largest_rank = 8
    with pytest.raises(InputError, match="takes rank 18"):
        copies.folder(mix)
    assert folder.name == vllm_name(mix)


def test_a_copy_is_written_once_and_swept_when_it_was_not_used_for_long(copies, originals):
    folder = copies.folder(((IDS["plain"], 1.0),))
    other = copies.folder(((IDS["rslora"], 1.0),))
    stamp = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    long_ago = time.time() - 40 * 86400
    for path in (folder, other):
        os.utime(path, (long_ago, long_ago))
    assert copies.folder(((IDS["plain"], 1.0),)) == folder
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    VllmCopies(copies.root, inspect_adapter, copies._tensors, 16)
    assert folder.is_dir()
    assert not other.exists()
    assert not copies.touch(((IDS["rslora"], 1.0),))


def test_blends_do_not_pile_up(copies):
    half, plain = ((IDS["plain"], 0.5),), ((IDS["plain"], 1.0),)
    folder = copies.folder(half)
    copies.discard(vllm_name(half))
    assert not folder.exists()
    folder = copies.folder(plain)
    copies.discard(vllm_name(plain))
    assert folder.is_dir()  # another server may read it
    folder = copies.folder(half)
    copies.close()
    assert not folder.exists()
