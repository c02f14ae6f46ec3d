"""Damaged files of image transformers: each is read, or refused with a sentence; what was read can be written."""

import contextlib
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from haori.core.errors import HaoriError
from haori.library.formats.registry import format_named, read_updates
from tests.adapter_files import save

if TYPE_CHECKING:
    from torch import Tensor

SIZES = {
    "double_blocks_0_img_attn_qkv": (24, 8), "double_blocks_0_img_mlp_0": (32, 8), "single_blocks_0_linear1": (56, 8),
    "single_blocks_0_linear2": (8, 40), "final_layer_adaLN_modulation_1": (16, 8),
}  # fmt: skip


def adapter(choose: random.Random) -> "dict[str, Tensor]":
    """Return an adapter whose modules are of all kinds."""
    import torch

    one, found = torch.ones, {"lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm": torch.ones(4)}
    for name, (out, inner) in SIZES.items():
        kinds: list[dict[str, Tensor]] = [
            {"lora_down.weight": one(2, inner), "lora_up.weight": one(out, 2)},
            {f"hada_w{n}_{f}": one(out, 2) if f == "a" else one(2, inner) for n in "12" for f in "ab"},
            {"lokr_w1": one(2, 2), "lokr_w2": one(out // 2, inner // 2)},
            {"diff": one(out, inner)},
        ]
        rest = {
            "alpha": torch.tensor(1.0),
            "diff_b": one(out),
            "dora_scale": one(*choose.choice([(out, 1), (1, inner)])),
        }
        ends = {**choose.choice(kinds), **{end: rest[end] for end in rest if choose.random() < 0.5}}
        found |= {f"lora_unet_{name}.{end}": tensor for end, tensor in ends.items()}
    return found


def damage(tensors: "dict[str, Tensor]", choose: random.Random) -> None:
    import torch

    key = choose.choice(sorted(tensors))
    tensor = tensors.pop(key)
    sizes = list(tensor.shape) or [1]
    place = choose.randrange(len(sizes))
    match choose.choice(["missing", "size", "empty", "dtype", "key", "nan", "axes", "turned"]):
        case "size":
            sizes[place] += choose.choice([-1, 1, 7])
            tensors[key] = torch.ones(*sizes)
        case "empty":
            sizes[place] = 0
            tensors[key] = torch.ones(*sizes)
        case "dtype":
            tensors[key] = tensor.to(choose.choice([torch.int64, torch.bool, torch.bfloat16]))
        case "key":
            tensors[key[:-1] + choose.choice("abx0")] = tensor
        case "nan":
            tensors[key] = tensor * float("nan")
        case "axes":
            tensors[key] = tensor.reshape(*tensor.shape, 1)
        case "turned":
            tensors[key] = tensor.T.contiguous() if tensor.dim() == 2 else tensor.reshape(-1)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    choose, read = random.Random(seed), 0
    for _ in range(60):
        tensors = adapter(choose)
        for _ in range(choose.choice([0, 1, 1, 2])):
            damage(tensors, choose)
        save(tmp_path / "a.safetensors", tensors)
        with contextlib.suppress(HaoriError):
            updates = read_updates(tmp_path / "a.safetensors")
            read += 1
            assert all(update.delta().dim() for update in updates.modules.values() if update.factors)
            for name in ("kohya", "onetrainer"):
                with contextlib.suppress(HaoriError):
                    format_named(name).write(updates, tmp_path / "b.safetensors")
    assert 5 < read < 55
