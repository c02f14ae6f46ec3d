"""A checkpoint merged on disk: every value is W + dW in float64 rounded once, all else is the base's own bytes."""

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from haori.bases import find_base
from haori.core.errors import BaseError, HaoriError, MismatchError, VerificationError
from haori.library.checkpoints import merging
from haori.library.checkpoints.merging import merge_checkpoint
from haori.library.checkpoints.rounding import nearest_of, round_once
from haori.library.updates import AdapterUpdates, ModuleUpdate
from tests.conftest import build_tiny_base
from tests.pipeline_folders import write_pipeline


def random(*shape: int, seed: int, scale: float = 0.1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def lora(out: int, inputs: int, seed: int, **fields: Any) -> ModuleUpdate:
    factors = {"A": random(3, inputs, seed=seed), "B": random(out, 3, seed=seed + 1)}
    return ModuleUpdate("lora", factors, alpha=6.0, **fields)


def sharded(folder: Path, dtype: torch.dtype, tie: bool = True) -> Path:
    """A tiny Llama in two shards, one tensor of which is in an odd place, in 16 bits."""
    build_tiny_base(folder)
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    if not tie:
        config["tie_word_embeddings"] = False
        tensors["lm_head.weight"] = random(*tensors["model.embed_tokens.weight"].shape, seed=99).to(dtype)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt", "note": "kept"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rounded_by_fractions(exact: float, dtype: torch.dtype) -> float:
    """The nearest number of a dtype, ties to even, by rational arithmetic."""
    digits, least = (8, -133) if dtype == torch.bfloat16 else (11, -24)
    value = Fraction(exact)
    if value == 0:
        return 0.0
    exponent = max(least, int(np.frexp(exact)[1]) - digits)
    scaled = value / Fraction(2) ** exponent
    return float(round(scaled) * Fraction(2) ** exponent)  # Python's round is to even


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_the_nearest_once(dtype: torch.dtype) -> None:
    numbers = random(400, seed=1, scale=1.0).double() + random(400, seed=2, scale=1e-9).double()
    value = numbers.float().to(dtype)
    ties = (value.double() + (value.view(torch.int16) + 1).view(dtype).double()) / 2
    beside = [ties, ties * (1 + 2e-12), ties * (1 - 2e-12)]
    exact = torch.cat([numbers, *beside, -numbers, numbers * 1e-6, torch.zeros(1, dtype=torch.float64)])
    expected = torch.tensor([rounded_by_fractions(value, dtype) for value in exact.tolist()], dtype=torch.float64)
    found = round_once(exact, dtype).double()
    assert torch.equal(found, expected)
    assert not torch.equal(exact.to(dtype).double(), expected), "torch's own is rounded twice"
    near = nearest_of(found.to(dtype), exact)
    assert bool(near.all())
    off = found.to(dtype).view(torch.int16) + 1
    assert int(nearest_of(off.view(dtype), exact).sum()) < len(exact) // 4, "only ties have two nearest"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sharded_text_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base_folder = sharded(tmp_path / "base", dtype)
    dora = lora(64, 64, 5, magnitude=random(64, seed=7).abs() + 0.5)
    full = ModuleUpdate("diff", {"diff": random(32, 64, seed=8)})
    modules = {
        "model.model.layers.0.self_attn.q_proj": lora(64, 64, 1),
        "model.model.layers.1.mlp.down_proj": lora(64, 128, 3),
        "model.model.layers.0.self_attn.o_proj": dora,
        "model.model.layers.1.self_attn.v_proj": full,
        "model.model.norm": ModuleUpdate("diff", {"diff": random(64, seed=9)}),
    }
    merged = merge_checkpoint(find_base(str(base_folder)), AdapterUpdates(modules), tmp_path / "out", adapter="a")
    assert merged.verification.passed
    before, after = tensors_of(base_folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        update = modules.get(f"model.{name.removesuffix('.weight')}")
        wide = weight.double()
        if update is None:
            assert torch.equal(after[name], weight), name
            continue
        if update.kind == "diff":
            exact = wide + update.factors["diff"].double()
        else:
            exact = wide + 2.0 * update.factors["B"].double() @ update.factors["A"].double()
        if update.magnitude is not None:
            exact = update.magnitude.double()[:, None] * exact / exact.square().sum(dim=1, keepdim=True).sqrt()
        expected = [rounded_by_fractions(value, dtype) for value in exact.flatten().tolist()]
        assert torch.equal(after[name].double().flatten(), torch.tensor(expected, dtype=torch.float64)), name
        assert not torch.equal(after[name], weight)
    for file in base_folder.iterdir():
        other = tmp_path / "out" / file.name
        assert other.is_file()
        if file.suffix != ".safetensors":
            assert json.loads(other.read_text()) == json.loads(file.read_text()) if file.suffix == ".json" else True
            continue
        with safe_open(file, "pt") as one, safe_open(other, "pt") as two:
            assert one.metadata() == two.metadata()
        assert file.read_bytes()[:64] == other.read_bytes()[:64], "the header is the base's own"
    proof = json.loads((tmp_path / "out" / "haori_merge.json").read_text())
    assert proof["verification"]["passed"]


def logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("changed", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tie", [True, False])
def test_embedding_and_head(tmp_path: Path, changed: list[str], tie: bool) -> None:
    """Where the base ties them and the adapter changes one, the merged model has two matrices."""
    base_folder = sharded(tmp_path / "base", torch.bfloat16, tie)
    rows = tensors_of(base_folder)["model.embed_tokens.weight"].shape[0]
    paths = {"embed_tokens": "model.model.embed_tokens", "lm_head": "model.lm_head"}
    modules = {paths[name]: lora(rows, 64, seed) for seed, name in enumerate(changed, start=20)}
    merge_checkpoint(find_base(str(base_folder)), AdapterUpdates(modules), tmp_path / "out", adapter="a")
    before, after = tensors_of(base_folder), tensors_of(tmp_path / "out")
    embedding = before["model.embed_tokens.weight"]
    for name, weight in (("embed_tokens", embedding), ("lm_head", before.get("lm_head.weight", embedding))):
        key = "model.embed_tokens.weight" if name == "embed_tokens" else "lm_head.weight"
        update = modules.get(paths[name])
        delta = 0.0 if update is None else 2.0 * update.factors["B"].double() @ update.factors["A"].double()
        assert torch.equal(after[key], round_once(weight.double() + delta, torch.bfloat16)), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(model.lm_head.weight, after["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, after["model.embed_tokens.weight"])


def test_an_image_pipeline(tmp_path: Path, tiny_base_folder: Path) -> None:
    """Convolutions, LoHa without a kernel, a text encoder saved by transformers 5, files copied beside."""
    folder = write_pipeline(tmp_path / "painter", tiny_base_folder)
    (folder / "unet" / "unused.bin").write_bytes(b"never copied")
    conv = ModuleUpdate("lora", {"A": random(2, 4, 3, 3, seed=1), "B": random(4, 2, 1, 1, seed=2)}, alpha=1.0)
    halves = {"w1_a": random(4, 2, seed=3), "w1_b": random(2, 36, seed=4), "w2_a": random(4, 2, seed=5),
              "w2_b": random(2, 36, seed=6)}  # fmt: skip
    text = lora(32, 16, 7)
    modules = {
        "unet.conv_in": conv, "unet.conv_out": ModuleUpdate("loha", halves, alpha=2.0),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": text,
    }  # fmt: skip
    out = tmp_path / "out"
    merge_checkpoint(find_base(str(folder)), AdapterUpdates(modules), out, adapter="style")
    before, after = tensors_of(folder / "unet"), tensors_of(out / "unet")
    dw = 0.5 * torch.einsum("or,rikl->oikl", conv.factors["B"][..., 0, 0].double(), conv.factors["A"].double())
    assert torch.equal(after["conv_in.weight"], (before["conv_in.weight"].double() + dw).float())
    one, two = (halves[f"w{i}_a"].double() @ halves[f"w{i}_b"].double() for i in (1, 2))
    expected = before["conv_out.weight"].double() + (one * two).reshape(4, 4, 3, 3)
    assert torch.equal(after["conv_out.weight"], expected.float())
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        folder / "vae" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()
    name = next(name for name in tensors_of(folder / "text_encoder") if name.endswith("layers.0.mlp.fc1.weight"))
    dw = 2.0 * text.factors["B"].double() @ text.factors["A"].double()
    weight = tensors_of(folder / "text_encoder")[name].double()
    assert torch.equal(tensors_of(out / "text_encoder")[name], (weight + dw).float())
    assert json.loads((out / "model_index.json").read_text()) == json.loads((folder / "model_index.json").read_text())
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    assert (out / "tokenizer" / "tokenizer.json").is_file()
    assert not (out / "unet" / "unused.bin").exists()


@pytest.mark.parametrize("fault", ["scale", "one value", "another tensor", "a file cut short"])
def test_a_faulty_merge_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """What is written is compared with what it should be: a tenth of the effect, and a single value, are found."""
    base_folder = sharded(tmp_path / "base", torch.bfloat16)
    modules = {"model.model.layers.0.self_attn.q_proj": lora(64, 64, 1)}
    write = merging.write_checkpoint

    def faulty(plan: Any, targets: dict[Path, Path], advance: Any) -> None:
        write(plan, targets, advance)
        changed = "model.layers.0.self_attn.q_proj.weight"
        name = changed if fault in {"scale", "one value"} else "model.layers.1.mlp.up_proj.weight"
        target = next(path for path in targets.values() if name in load_file(path))
        with safe_open(target, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(target)
        if fault == "scale":
            weight = tensors_of(base_folder)[name].float()
            tensors[name] = (weight + 0.9 * (tensors[name].float() - weight)).bfloat16()
        elif fault == "one value":
            tensors[name].view(torch.int16)[3, 5] += 1
        elif fault == "another tensor":
            tensors[name].view(torch.int16)[0, 0] ^= 1
        if fault == "a file cut short":
            target.write_bytes(target.read_bytes()[:-10])
        else:
            save_file(tensors, target, metadata=metadata)

    monkeypatch.setattr(merging, "write_checkpoint", faulty)
    with pytest.raises(HaoriError) as raised:
        merge_checkpoint(find_base(str(base_folder)), AdapterUpdates(modules), tmp_path / "out", adapter="a")
    if fault != "a file cut short":
        assert isinstance(raised.value, VerificationError)
        assert {"scale": "are not W + dW", "one value": "1 values are not W + dW", "another tensor": "1 bytes are not"}[
            fault
        ] in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*"))


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    base_folder = sharded(tmp_path / "base", torch.bfloat16)
    base = find_base(str(base_folder))
    unknown = AdapterUpdates({"model.model.layers.7.self_attn.q_proj": lora(64, 64, 1)})
    with pytest.raises(MismatchError, match=r"layers\.7"):
        merge_checkpoint(base, unknown, tmp_path / "out", adapter="a")
    whole = AdapterUpdates(
        {"model.model.layers.0.self_attn.q_proj": lora(64, 64, 1)}, extra={"model.score": random(2, seed=1)}
    )
    with pytest.raises(MismatchError, match=r"'model.score'.*without --stream"):
        merge_checkpoint(base, whole, tmp_path / "out", adapter="a")
    huge = lora(64, 64, 1)
    huge = ModuleUpdate("lora", {**huge.factors, "B": huge.factors["B"] * float("inf")})
    with pytest.raises(VerificationError, match="not W"):
        broken = AdapterUpdates({"model.model.layers.0.self_attn.q_proj": huge})
        merge_checkpoint(base, broken, tmp_path / "out", adapter="a")
    tiny = AdapterUpdates({"model.model.layers.0.self_attn.q_proj": lora(64, 64, 1)})
    for update in tiny.modules.values():
        update.factors["B"].mul_(1e-9)
    with pytest.raises(VerificationError, match="the effect is too small"):
        merge_checkpoint(base, tiny, tmp_path / "out", adapter="a")
    shutil.rmtree(base_folder)
    coarse = sharded(tmp_path / "base8", torch.bfloat16)
    file = coarse / "model-00001-of-00002.safetensors"
    name = next(name for name in load_file(file) if name.endswith("_proj.weight"))
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file)
    module = f"model.{name.removesuffix('.weight')}"
    with pytest.raises(BaseError, match="F8_E4M3"):
        eight = AdapterUpdates({module: lora(*tensors[name].shape, 1)})
        merge_checkpoint(find_base(str(coarse)), eight, tmp_path / "out", adapter="a")
    assert not (tmp_path / "out").exists()
