"""Random updates of every kind, for property tests of formats."""

from typing import Any

import torch
from hypothesis import strategies as st

from haori.library.updates import ModuleUpdate

_SIZES = st.integers(1, 6)


@st.composite
def module_updates(draw: Any, kinds: tuple[str, ...] = ("lora", "tucker", "loha", "lokr", "diff")) -> ModuleUpdate:
    """Draw an update of a matrix or a 3 x 3 convolution, of any kind and shape that trainers write."""
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    out, inner, rank = draw(_SIZES) * 2, draw(_SIZES) * 2, draw(st.integers(1, 4))
    kernel = draw(st.sampled_from([(), (3, 3), (1, 1)]))
    kind = draw(st.sampled_from(kinds))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers).to(dtype)

    factors, shape = _factors(draw, kind, random, out, inner, rank, kernel)
    alpha = draw(st.none() | st.floats(0.25, 64, width=16)) if kind != "diff" else None
    magnitude = None
    if kind != "diff" and draw(st.booleans()):
        ones = [1] * (len(shape) - 1)
        magnitude = random(out, *ones) if draw(st.booleans()) else random(1, inner, *ones[1:])
    bias = random(out) if draw(st.booleans()) else None
    rslora = kind == "lora" and alpha is not None and draw(st.booleans())
    name: Any = "lora" if kind == "tucker" else kind
    return ModuleUpdate(name, factors, alpha, rslora, magnitude, bias)


def _factors(
    draw: Any, kind: str, random: Any, out: int, inner: int, rank: int, kernel: tuple[int, ...]
) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    flat = (out, inner * 9) if kernel == (3, 3) else (out, inner)
    if kind == "lora":
        return {"A": random(rank, inner, *kernel), "B": random(out, rank, *[1] * len(kernel))}, (out, inner, *kernel)
    if kind == "tucker":
        core = random(rank, rank, 3, 3)
        return {"A": random(rank, inner, 1, 1), "B": random(out, rank, 1, 1), "mid": core}, (out, inner, 3, 3)
    if kind == "loha":
        if draw(st.booleans()):
            cores = {f"t{n}": random(rank, rank, 3, 3) for n in (1, 2)}
            halves = {f"w{n}_a": random(rank, out) for n in (1, 2)} | {f"w{n}_b": random(rank, inner) for n in (1, 2)}
            return cores | halves, (out, inner, 3, 3)
        halves = {f"w{n}_a": random(out, rank) for n in (1, 2)} | {f"w{n}_b": random(rank, flat[1]) for n in (1, 2)}
        return halves, (out, inner)
    if kind == "lokr":
        first = draw(st.sampled_from(["whole", "product"]))
        second = draw(st.sampled_from(["whole", "product", "tucker"]))
        factors = {"w1": random(2, 2)} if first == "whole" else {"w1_a": random(2, rank), "w1_b": random(rank, 2)}
        shape: tuple[int, ...] = (out, inner)
        if second == "whole":
            factors["w2"] = random(out // 2, inner // 2, *kernel)
            shape = (out, inner, *kernel)
        elif second == "product":
            factors |= {"w2_a": random(out // 2, rank), "w2_b": random(rank, inner // 2)}
        else:
            factors |= {
                "w2_a": random(rank, out // 2),
                "w2_b": random(rank, inner // 2),
                "t2": random(rank, rank, 3, 3),
            }
            shape = (out, inner, 3, 3)
        return factors, shape
    shape = draw(st.sampled_from([(out,), (out, inner), (out, inner, *kernel)]))
    return {"diff": random(*shape)}, shape
