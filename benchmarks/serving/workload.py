"""What every contender is asked to do: prompts from the demo's reviews, made adapters, and who asks for which.

An adapter is rank 16 on all linear layers of SmolLM2, bf16, with random factors: A as at the start of training, B so
small that answers change and stay finite. No two have a number in common but by chance.
"""

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

BASE = "smollm2-135m-instruct"
RANK = 16
POOL = 640
_LAYERS, _WIDTH, _INNER, _KV = 30, 576, 1536, 192
_SHAPES = {
    "self_attn.q_proj": (_WIDTH, _WIDTH), "self_attn.k_proj": (_KV, _WIDTH), "self_attn.v_proj": (_KV, _WIDTH),
    "self_attn.o_proj": (_WIDTH, _WIDTH), "mlp.gate_proj": (_INNER, _WIDTH), "mlp.up_proj": (_INNER, _WIDTH),
    "mlp.down_proj": (_WIDTH, _INNER),
}  # fmt: skip
_B_DEVIATION = 0.1

Request = tuple[list[int], int | None]
"""Token ids of a prompt, and the number of the adapter; None for the base."""


def prompts(base: Any) -> list[list[int]]:
    """Return the prompts, as token ids with the chat template applied; all different."""
    from haori.bases import load_tokenizer
    from haori.data import fetch_reviews

    tokenizer = load_tokenizer(base)
    found = []
    for review in fetch_reviews().train(POOL):
        messages = json.loads(review.to_json())["messages"][:1]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def adapter_folder(root: Path, number: int) -> Path:
    """Return the folder of an adapter."""
    return root / f"{number:04}"


def write_adapters(root: Path, count: int) -> None:
    """Write the adapters 0 to `count` - 1 that are not there yet, about 10 MB each."""
    for number in range(count):
        final = adapter_folder(root, number)
        if not final.is_dir():
            stage = final.with_name(f".{final.name}")
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
            _write_adapter(stage, number)
            stage.rename(final)


def _write_adapter(folder: Path, number: int) -> None:
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for layer in range(_LAYERS):
        for module, (out, width) in _SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            a = torch.empty(RANK, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
            b = torch.empty(out, RANK).normal_(0.0, _B_DEVIATION, generator=generator)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a.bfloat16(), b.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = [module.rpartition(".")[2] for module in _SHAPES]
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=modules, task_type="CAUSAL_LM", base_model_name_or_path=BASE,
        inference_mode=True,
    )  # fmt: skip
    config.save_pretrained(folder)


def adapter_bytes() -> int:
    """Return the size of one adapter's factors in bf16."""
    return 2 * _LAYERS * sum(RANK * (out + width) for out, width in _SHAPES.values())


def requests(pool: Sequence[list[int]], turn: int, adapters: Sequence[int | None]) -> list[Request]:
    """Return a request for each of `adapters`, with the prompts that are next in this turn."""
    first = turn * len(adapters)
    return [(pool[(first + i) % len(pool)], adapter) for i, adapter in enumerate(adapters)]


def spread(distinct: int, count: int) -> list[int | None]:
    """Return the adapters of `count` requests, of which so many are distinct; None (the base) where none is."""
    return [i % distinct if distinct else None for i in range(count)]


def zipf(registered: int, seed: int) -> Iterator[int]:
    """Draw adapters for ever: the one of rank k with a probability proportional to 1/k (Zipf's law, exponent 1)."""
    totals = list(accumulate(1 / (rank + 1) for rank in range(registered)))
    generator = random.Random(seed)
    while True:
        yield generator.choices(range(registered), cum_weights=totals)[0]
