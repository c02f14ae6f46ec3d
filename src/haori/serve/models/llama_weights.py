"""The weights of a Llama-like model, laid out for serving: q, k and v in one matrix, gate and up in another."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from haori.serve.adapters.packed import Site
from haori.serve.models.llama_plan import BlockPlan, LlamaPlan
from haori.serve.models.weight import Weight, WeightFormat, pack_weight

__all__ = ["LayerWeights", "LlamaWeights", "lay_out_llama"]

_TensorOf = Callable[[str], Tensor]


@dataclass(frozen=True)
class LayerWeights:
    """One block. Linear weights come in the order of the sites: q k v, o, gate up, down."""

    linears: tuple[Weight, Weight, Weight, Weight]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    attention_norm: tuple[str, Tensor]
    mlp_norm: tuple[str, Tensor]
    q_norm: tuple[str, Tensor] | None
    k_norm: tuple[str, Tensor] | None


@dataclass(frozen=True)
class LlamaWeights:
    """A whole model.

    Attributes:
        layers: Its blocks.
        sites: Four linear sites for each block.
        embedding: V D.
        embedding_name: Its parameter name.
        head: D to V.
        head_name: Its parameter name.
        head_tied: The head is the embedding.
        final_norm: Name and weight.
        epsilon: Of the norms.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_width: Numbers in a head.
        cosines: Of the rotary angles, [context length, head width].
        sines: The same, negative in the first half of the head.
        scale: Of attention scores.
        context_length: Longest sequence in tokens.
    """

    layers: tuple[LayerWeights, ...]
    sites: tuple[Site, ...]
    embedding: Tensor
    embedding_name: str
    head: Weight
    head_name: str
    head_tied: bool
    final_norm: tuple[str, Tensor]
    epsilon: float
    heads: int
    kv_heads: int
    head_width: int
    cosines: Tensor
    sines: Tensor
    scale: float
    context_length: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations."""
        return self.embedding.dtype

    @property
    def vector_names(self) -> tuple[str, ...]:
        """Names of all norm weights."""
        per_layer = [
            named[0]
            for layer in self.layers
            for named in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
            if named is not None
        ]
        return (*per_layer, self.final_norm[0])


def lay_out_llama(
    plan: LlamaPlan, tensor_of: _TensorOf, form: WeightFormat, dtype: torch.dtype, longest: int
) -> LlamaWeights:
    """Bring a model's weights into the layout for serving, matrix by matrix.

    Args:
        plan: The model.
        tensor_of: Returns a parameter by its full name; nothing that it returns is kept or changed.
        form: Format of the linear weights.
        dtype: Of everything else.
        longest: Longest sequence to be prepared for, in tokens.
    """

    def read(name: str) -> Tensor:
        return tensor_of(name).to(dtype)

    def copy(name: str) -> Tensor:
        return tensor_of(name).to(dtype, copy=True)

    def norm(module: str) -> tuple[str, Tensor]:
        return f"{module}.weight", copy(f"{module}.weight")

    longest = min(longest, plan.context_length)
    embedding = copy(f"{plan.embedding}.weight")
    head = embedding if plan.head is None else copy(f"{plan.head}.weight")
    angles = torch.arange(longest)[:, None].float() * torch.tensor(plan.frequencies)  # T d/2
    cosines, sines = angles.cos() * plan.angle_scale, angles.sin() * plan.angle_scale
    return LlamaWeights(
        layers=tuple(_lay_out_block(block, plan, read, norm, form) for block in plan.blocks),
        sites=tuple(_site(group, plan) for block in plan.blocks for group in block.groups),
        embedding=embedding,
        embedding_name=f"{plan.embedding}.weight",
        head=pack_weight(head, form),
        head_name=plan.head_name,
        head_tied=plan.head is None,
        final_norm=norm(plan.final_norm),
        epsilon=plan.epsilon,
        heads=plan.heads,
        kv_heads=plan.kv_heads,
        head_width=plan.head_width,
        cosines=torch.cat([cosines, cosines], 1).to(embedding.device, dtype),
        sines=torch.cat([-sines, sines], 1).to(embedding.device, dtype),
        scale=plan.scale,
        context_length=longest,
    )


def _site(group: tuple[str, ...], plan: LlamaPlan) -> Site:
    return Site(group, plan.linears[group[0]][1], tuple(plan.linears[name][0] for name in group))


def _lay_out_block(
    block: BlockPlan,
    plan: LlamaPlan,
    read: _TensorOf,
    norm: Callable[[str], tuple[str, Tensor]],
    form: WeightFormat,
) -> LayerWeights:
    weights: list[Weight] = []  # of joined tensors, which are copies in any case
    biases: list[Tensor | None] = []
    for group in block.groups:
        parts = [read(f"{name}.weight") for name in group]
        weights.append(pack_weight(torch.cat(parts), form))
        held = [
            read(f"{name}.bias") if name in plan.biased else part.new_zeros(len(part))
            for name, part in zip(group, parts, strict=True)
        ]
        biases.append(None if plan.biased.isdisjoint(group) else torch.cat(held))
    return LayerWeights(
        linears=(weights[0], weights[1], weights[2], weights[3]),
        biases=(biases[0], biases[1], biases[2], biases[3]),
        attention_norm=norm(block.attention_norm),
        mlp_norm=norm(block.mlp_norm),
        q_norm=None if block.q_norm is None else norm(block.q_norm),
        k_norm=None if block.k_norm is None else norm(block.k_norm),
    )
