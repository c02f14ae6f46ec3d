"""Which module has which heads, from the model's own configuration, or from the attention of diffusers around it.

Query, key and value projections make one head per block of output rows, keys and values by the number of key-value
heads. The output projection reads one head per block of input columns. Anything else, a fused projection included, is
one head, and so is a convolution, or a projection whose size is not heads times head dimension.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import nn

__all__ = ["HeadLayout", "head_layout", "side_of"]

_QUERY = frozenset({"add_q_proj", "q", "q_lin", "q_proj", "query", "query_proj", "to_q", "wq"})
_KEY_VALUE = frozenset(
    {"add_k_proj", "add_v_proj", "k", "k_lin", "k_proj", "key", "key_proj", "to_k", "to_v", "v", "v_lin", "v_proj",
     "value", "value_proj", "wk", "wv"}
)  # fmt: skip
# `dense` is the output projection of BERT's kind only beside attention; feed-forward layers bear the name too.
_OUTPUT = re.compile(
    r"(^|\.)(o|o_proj|out_proj|out_lin|wo|to_out\.0|to_add_out|(self_)?(attn|attention)(\.output)?\.dense)$"
)


class _Shape(NamedTuple):
    """Heads of an attention, and the dimension of one."""

    heads: int
    key_value_heads: int
    dimension: int


class HeadLayout(NamedTuple):
    """Number of heads, and whether they are blocks of output rows (of B) or of input columns (of A)."""

    heads: int
    side: Literal["rows", "columns"]


def side_of(name: str) -> Literal["rows", "columns"]:
    """Return the side of the heads of the module `name`."""
    return "columns" if _OUTPUT.search(name) else "rows"


def head_layout(model: "nn.Module", name: str, module: "nn.Linear | nn.Conv2d", *, per_head: bool) -> HeadLayout:
    """Return the heads of the linear module or convolution `module`, which stands in `model` under `name`."""
    side, leaf = side_of(name), name.rpartition(".")[2]
    one = HeadLayout(1, side)
    shape = _attention_shape(model, name) if per_head else None
    if shape is None or not (side == "columns" or leaf in _QUERY or leaf in _KEY_VALUE):
        return one
    heads = shape.key_value_heads if leaf in _KEY_VALUE else shape.heads
    if not hasattr(module, "out_features"):
        return one  # a convolution
    size = module.in_features if side == "columns" else module.out_features
    return HeadLayout(heads, side) if heads * shape.dimension == size else one


def _attention_shape(model: "nn.Module", name: str) -> "_Shape | None":
    attention: Any = next(_attentions(model, name), None)
    if attention is not None:
        dimension = attention.inner_dim // attention.heads
        key_value: int = getattr(attention, "inner_kv_dim", attention.inner_dim)
        return _Shape(attention.heads, key_value // dimension, dimension)
    config = next(_configs(model, name), None)
    if config is None:
        return None
    heads = config.num_attention_heads
    dimension = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    return _Shape(heads, getattr(config, "num_key_value_heads", None) or heads, dimension)


def _attentions(model: "nn.Module", name: str) -> "Iterator[nn.Module]":
    """Yield the attention modules of diffusers around a module, which have their own number of heads."""
    while name:
        name = name.rpartition(".")[0]
        module: Any = model.get_submodule(name)
        if isinstance(module.__dict__.get("heads"), int) and isinstance(module.__dict__.get("inner_dim"), int):
            yield module


def _configs(model: "nn.Module", name: str) -> "Iterator[Any]":
    """Yield the configurations with a number of heads around a module, the nearest first.

    A model of several parts (image and text, say) has one for each, and attention modules carry their part's.
    """
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if isinstance(getattr(config, "num_attention_heads", None), int):
            yield config
