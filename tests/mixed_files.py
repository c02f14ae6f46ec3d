"""Kohya and LyCORIS files that change a tiny UNet and text encoder in every way there is, with their formulas.

The changes are written here again in float64 from the tensors of the file, by the papers' formulas alone.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]
"""Gives dW, the whole change at strength 1, of a weight W in float64."""

RANK = 3


class Written:
    """The tensors of a file, and what each changes.

    Attributes:
        tensors: As they are saved.
        weights: Change of each weight by the name of its live module.
        biases: Change of each bias.
    """

    def __init__(self, seed: int, size: float = 0.5) -> None:
        self.numbers = torch.Generator().manual_seed(seed)
        self.size = size
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, Change] = {}
        self.biases: dict[str, Tensor] = {}

    def random(self, *shape: int) -> Tensor:
        return self.size * torch.randn(*shape, generator=self.numbers)

    def put(self, module: str, parts: Mapping[str, Tensor], alpha: float | None) -> None:
        component, _, path = module.partition(".")
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[component]
        for name, tensor in parts.items():
            self.tensors[f"{prefix}{path.replace('.', '_')}.{name}"] = tensor
        if alpha is not None:
            self.tensors[f"{prefix}{path.replace('.', '_')}.alpha"] = torch.tensor(alpha)

    def save(self, path: Path, **metadata: str) -> Path:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, path, metadata or None)
        return path

    def lora(self, module: str, layer: Any, rank: int = RANK, alpha: float = 2.0) -> Tensor:
        """LoRA and LoCon: dW = alpha / r B A."""
        shape = layer.weight.shape
        a, b = self.random(rank, *shape[1:]), self.random(shape[0], rank, *[1] * (len(shape) - 2))
        self.put(module, {"lora_down.weight": a, "lora_up.weight": b}, alpha)
        delta = alpha / rank * torch.einsum("or,ri->oi", b.flatten(1).double(), a.flatten(1).double()).reshape(shape)
        self.weights[module] = lambda _: delta
        return delta

    def tucker(self, module: str, layer: Any, alpha: float = 2.0) -> None:
        """LoCon with a core: dW[o, i, k] = alpha / r sum_pq B[o, p] core[p, q, k] A[q, i]."""
        out, inner, *kernel = layer.weight.shape
        a, b = self.random(RANK, inner, 1, 1), self.random(out, RANK, 1, 1)
        core = self.random(RANK, RANK, *kernel)
        self.put(module, {"lora_down.weight": a, "lora_up.weight": b, "lora_mid.weight": core}, alpha)
        delta = torch.einsum(
            "op,pqxy,qi->oixy", b[:, :, 0, 0].double(), core.double(), a[:, :, 0, 0].double()
        )  # fmt: skip
        self.weights[module] = lambda _: alpha / RANK * delta

    def loha(self, module: str, layer: Any, rank: int = 2, alpha: float = 1.0) -> None:
        """LoHa: dW = alpha / r (w1_a w1_b) * (w2_a w2_b), elementwise."""
        out, inner = layer.weight.shape[0], layer.weight[0].numel()
        w = [self.random(*shape) for shape in ((out, rank), (rank, inner)) * 2]
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        self.put(module, dict(zip(names, w, strict=True)), alpha)
        d = [part.double() for part in w]
        delta = (alpha / rank * (d[0] @ d[1]) * (d[2] @ d[3])).reshape(layer.weight.shape)
        self.weights[module] = lambda _: delta

    def lokr(self, module: str, layer: Any, alpha: float = 3.0, *, low_rank: bool) -> None:
        """LoKr: dW[(o1 o2), (i1 i2)] = alpha / r w1[o1, i1] w2[o2, i2]; unscaled where both are whole."""
        out, inner = layer.weight.shape
        first = self.random(2, 2)
        if low_rank:
            a, b = self.random(out // 2, 1), self.random(1, inner // 2)
            self.put(module, {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b}, alpha)
            second, scale = a.double() @ b.double(), alpha / 1
        else:
            second, scale = self.random(out // 2, inner // 2), 1.0
            self.put(module, {"lokr_w1": first, "lokr_w2": second}, alpha)
        delta = torch.einsum("ab,cd->acbd", first.double(), second.double()).reshape(out, inner)
        self.weights[module] = lambda _: scale * delta

    def dora(self, module: str, layer: Any, *, by_input: bool = False) -> None:
        """DoRA: dW = m (W + V) / |W + V| - W, the norm over each output's row, or over each input's column."""
        delta = self.lora(module, layer)
        axes = [axis for axis in range(layer.weight.dim()) if axis != int(by_input)]
        norm = torch.linalg.vector_norm(layer.weight.detach().double(), dim=axes, keepdim=True)
        magnitude = (norm * (1 + 0.3 * torch.rand(norm.shape, generator=self.numbers))).float()
        self.put(module, {"dora_scale": magnitude}, None)

        def change(weight: Tensor) -> Tensor:
            moved = weight + delta
            return magnitude.double() * moved / torch.linalg.vector_norm(moved, dim=axes, keepdim=True) - weight

        self.weights[module] = change

    def diff(self, module: str, layer: Any, *, norm: bool = False) -> None:
        """A whole difference, of the weight and the bias."""
        delta, bias = self.random(*layer.weight.shape), self.random(*layer.bias.shape)
        names = ("w_norm", "b_norm") if norm else ("diff", "diff_b")
        self.put(module, dict(zip(names, (delta, bias), strict=True)), None)
        self.weights[module] = lambda _: delta.double()
        self.biases[module] = bias.double()


BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


def every_kind(components: Mapping[str, Any], seed: int) -> Written:
    """Return a file with an update of every kind."""
    found = Written(seed)

    def layer(name: str) -> Any:
        component, _, path = name.partition(".")
        return components[component].get_submodule(path)

    ways: dict[str, Callable[[str, Any], Any]] = {
        f"{BLOCK}.attn1.to_q": found.lora,
        f"{BLOCK}.attn1.to_k": found.loha,
        f"{BLOCK}.attn1.to_v": lambda name, at: found.lokr(name, at, low_rank=True),
        f"{BLOCK}.attn1.to_out.0": found.dora,
        f"{BLOCK}.attn2.to_q": lambda name, at: found.lokr(name, at, low_rank=False),
        f"{BLOCK}.attn2.to_k": lambda name, at: found.dora(name, at, by_input=True),
        f"{BLOCK}.attn2.to_out.0": found.diff,
        f"{BLOCK}.norm1": lambda name, at: found.diff(name, at, norm=True),
        "unet.down_blocks.0.attentions.0.proj_in": found.lora,
        "unet.down_blocks.0.resnets.0.conv1": found.lora,
        "unet.down_blocks.0.resnets.0.conv2": found.tucker,
        "unet.down_blocks.0.resnets.0.norm1": lambda name, at: found.diff(name, at, norm=True),
        "unet.down_blocks.0.downsamplers.0.conv": found.loha,
        "unet.down_blocks.1.resnets.0.conv1": found.dora,
        "unet.time_embedding.linear_1": found.lora,
        "text_encoder.encoder.layers.0.self_attn.q_proj": found.lora,
        "text_encoder.encoder.layers.1.mlp.fc1": found.dora,
    }
    for name, way in ways.items():
        way(name, layer(name))
    return found
