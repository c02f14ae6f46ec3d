"""Large weights: converting one kohya file, and merging into a sharded checkpoint against copying it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BLOCKS = (("down_blocks", 0, 2, 320), ("down_blocks", 1, 2, 640), ("up_blocks", 2, 3, 640), ("up_blocks", 3, 3, 320))
LAYERS = ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "attn2_to_q", "attn2_to_out_0")


def write_kohya(path: Path, rank: int) -> None:
    """Write a LoRA of the attention of Stable Diffusion 1.5's UNet in fp16."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for side, block, attentions, width in BLOCKS:
        for attention in range(attentions):
            for layer in LAYERS:
                key = f"lora_unet_{side}_{block}_attentions_{attention}_transformer_blocks_0_{layer}"
                tensors[f"{key}.lora_down.weight"] = torch.randn(rank, width).half()
                tensors[f"{key}.lora_up.weight"] = torch.randn(width, rank).half()
                tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)


def convert(home: Path, rank: int, rounds: int) -> dict[str, Any]:
    """Read a kohya file and write it as diffusers does, in turns with a copy of the file."""
    from haori.library.formats.registry import format_named, read_updates

    source = home / "kohya.safetensors"
    write_kohya(source, rank)
    size = source.stat().st_size
    samples: dict[str, list[float]] = {"convert_mb_s": [], "copy_mb_s": []}
    for _ in range(rounds + 1):
        began = time.perf_counter()
        format_named("diffusers").write(read_updates(source), home / "diffusers.safetensors")
        middle = time.perf_counter()
        copy(source, home / "copy.safetensors")
        samples["convert_mb_s"].append(size / 1e6 / (middle - began))
        samples["copy_mb_s"].append(size / 1e6 / (time.perf_counter() - middle))
    return {"file_mb": size / 1e6, **{name: each[1:] for name, each in samples.items()}}  # the first one warms


def copy(source: Path, target: Path) -> None:
    """Copy a file and flush it to disk, as everything that Haori writes is."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def write_base(folder: Path, layers: int, hidden: int, shards: int) -> None:
    """Write a Llama checkpoint in bf16 with random weights, in shards; SmolLM2-1.7B has 24 layers of 2048."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=49152, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    model.tie_weights()
    size = sum(parameter.numel() * 2 for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + (64 << 20))


MERGE = """
import json, sys, time
from pathlib import Path
import torch
from haori.bases import find_base
from haori.library.checkpoints.merging import write_checkpoint
from haori.library.checkpoints.plan import plan_merge
from haori.library.checkpoints.tensors import BaseTensors
from haori.library.updates import AdapterUpdates, ModuleUpdate
from haori.training.memory import current_memory_bytes, peak_memory_bytes
folder, out = map(Path, sys.argv[1:])
base = find_base(str(folder))
tensors = BaseTensors(base)
torch.manual_seed(1)
config = json.loads((folder / "config.json").read_text())
hidden, inner = config["hidden_size"], config["intermediate_size"]
shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
modules = {}
for layer in range(config["num_hidden_layers"]):
    for name, (rows, columns) in shapes.items():
        factors = {"A": torch.randn(16, columns) * 0.02, "B": torch.randn(rows, 16) * 0.02}
        modules[f"model.model.layers.{layer}.{name}"] = ModuleUpdate("lora", factors, alpha=32.0)
plan = plan_merge(tensors, AdapterUpdates(modules), adapter="bench")
files = [file.source.path for file in plan.files]
before = current_memory_bytes()
began = time.perf_counter()
write_checkpoint(plan, {path: out / path.name for path in files})
took = time.perf_counter() - began
peak = peak_memory_bytes() - before
print(json.dumps({"s": took, "memory_bytes": peak, "shard_bytes": max(path.stat().st_size for path in files)}))
"""


def merge(home: Path, layers: int, hidden: int, shards: int, rounds: int) -> dict[str, Any]:
    """Merge a LoRA of rank 16 on all linear layers, in turns with copying the checkpoint."""
    base, out, copies = home / "base", home / "merged", home / "copies"
    write_base(base, layers, hidden, shards)
    for folder in (out, copies):
        folder.mkdir()
    files = sorted(base.glob("*.safetensors"))
    merged, copied = [], []
    for _ in range(rounds + 1):
        for file in files:  # both begin with the base in the page cache
            file.read_bytes()
        done = subprocess.run([sys.executable, "-c", MERGE, base, out], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        merged.append(json.loads(done.stdout.splitlines()[-1]))
        began = time.perf_counter()
        for file in files:
            copy(file, copies / file.name)
        copied.append(time.perf_counter() - began)
    return {
        "checkpoint_gb": sum(file.stat().st_size for file in files) / 1e9, "shards": len(files),
        "merge_s": [each["s"] for each in merged[1:]], "copy_s": copied[1:],
        "memory_shards": max(each["memory_bytes"] / each["shard_bytes"] for each in merged),
    }  # fmt: skip
