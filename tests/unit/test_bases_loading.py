"""Loading models and tokenizers, and the choice of dtype."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from haori import bases
from haori.core.errors import BaseError, FileFormatError, InputError


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))


def test_a_model_is_loaded_frozen_in_the_dtype_asked_for(tiny_base_folder: Path) -> None:
    base = bases.find_base(str(tiny_base_folder))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = bases.load_model(base, dtype=name, device="cpu")
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_loading_prints_nothing(tiny_base_folder: Path) -> None:
    code = (
        "import sys\nfrom haori import bases\n"
        "base = bases.find_base(sys.argv[1])\n"
        "model, tokenizer = bases.load_model(base), bases.load_tokenizer(base)\n"
        "bases.generate(model, tokenizer, [[1, 5], [1, 5, 6]], max_new_tokens=3, temperature=0.7, seed=1)\n"
        "bases.generate(model, tokenizer, [[1, 5], [1, 5, 6]], max_new_tokens=3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_base_folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""


def test_transformers_logging_is_put_back(tiny_base_folder: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    bases.load_model(bases.find_base(str(tiny_base_folder)))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_an_encoder_is_loaded_without_a_language_head(tiny_base_folder: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    base = bases.find_base(str(tmp_path / "bert"))
    model = bases.load_model(base)
    assert isinstance(model, BertModel)
    tokenizer = bases.load_tokenizer(bases.find_base(str(tiny_base_folder)))
    with pytest.raises(InputError, match="is an encoder"):
        bases.generate(model, tokenizer, [[1]])
    with pytest.raises(BaseError, match="has no tokenizer"):
        bases.load_tokenizer(base)


def test_a_tokenizer_without_padding_pads_with_its_end_token(folder: Path) -> None:
    import json

    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = bases.load_tokenizer(bases.find_base(str(folder)))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == json.loads((folder / "config.json").read_text())["vocab_size"]


def test_weights_that_do_not_fit_the_configuration_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    short = {name: tensor for name, tensor in state.items() if "layers.1.mlp" not in name}
    save_file(short, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseError, match=r"lack 3 of the model's weights, such as 'model\.layers\.1\.mlp"):
        bases.load_model(bases.find_base(str(folder)))
    state["model.norm.weight"] = state["model.norm.weight"][:-1].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseError, match="cannot be loaded"):
        bases.load_model(bases.find_base(str(folder)))


def test_damaged_tokenizers_are_refused(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(BaseError, match="tokenizer of 'base' cannot be loaded"):
        bases.load_tokenizer(bases.find_base(str(folder)))
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(FileFormatError, match="not valid JSON"):
        bases.find_base(str(folder))


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("LlamaForCausalLM", "FutureForCausalLM"))
    with pytest.raises(BaseError, match=r"FutureForCausalLM, which transformers .* does not know"):
        bases.load_model(bases.find_base(str(folder)))


def test_an_absent_device_is_named(tiny_base_folder: Path) -> None:
    base = bases.find_base(str(tiny_base_folder))
    for device in ("xpu:3", "warp-drive"):
        with pytest.raises(InputError, match="not available on this machine"):
            bases.load_model(base, device=device)


def test_dtype_choice() -> None:
    assert bases.choose_dtype("bf16", "cpu") == ("bf16", "as requested")
    automatic = bases.choose_dtype("auto", "cpu")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags
    assert automatic.name == ("bf16" if fast else "fp32")
    assert "processor" in automatic.reason
    assert bases.choose_dtype("auto", "mps").name == "fp32"
    assert bases.torch_dtype("fp16") is torch.float16
    with pytest.raises(InputError, match="did you mean 'bf16'"):
        bases.choose_dtype("bf6", "cpu")
    with pytest.raises(InputError, match="allowed are fp32, bf16, fp16"):
        bases.torch_dtype("auto")


def test_a_skeleton_has_the_modules_of_the_model_and_no_weights(tiny_base_folder: Path) -> None:
    base = bases.find_base(str(tiny_base_folder))
    skeleton, model = bases.load_skeleton(base), bases.load_model(base, dtype="fp32", device="cpu")
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}
    assert bases.linear_modules(skeleton) == bases.linear_modules(model)
