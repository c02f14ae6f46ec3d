"""Which module has which heads, from the model's own configuration.

Query, key and value projections make one head per block of output rows, keys and values by the number of key-value
heads. The output projection reads one head per block of input columns. Anything else, a fused projection included, is
one head, and so is a projection whose size is not heads times head dimension.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import nn

__all__ = ["HeadLayout", "head_layout", "side_of"]

_QUERY = frozenset({"q", "q_lin", "q_proj", "query", "query_proj", "wq"})
_KEY_VALUE = frozenset(
    {"k", "k_lin", "k_proj", "key", "key_proj", "v", "v_lin", "v_proj", "value", "value_proj", "wk", "wv"}
)
# `dense` is the output projection of BERT's kind only beside attention; feed-forward layers bear the name too.
_OUTPUT = re.compile(r"(^|\.)(o|o_proj|out_proj|out_lin|wo|(self_)?(attn|attention)(\.output)?\.dense)$")


class HeadLayout(NamedTuple):
    """Number of heads, and whether they are blocks of output rows (of B) or of input columns (of A)."""

    heads: int
    side: Literal["rows", "columns"]


def side_of(name: str) -> Literal["rows", "columns"]:
    """Return the side of the heads of the module `name`."""
    return "columns" if _OUTPUT.search(name) else "rows"


def head_layout(model: "nn.Module", name: str, linear: "nn.Linear", *, per_head: bool) -> HeadLayout:
    """Return the heads of the linear module `linear`, which stands in `model` under `name`."""
    side, leaf = side_of(name), name.rpartition(".")[2]
    one = HeadLayout(1, side)
    config = next(_configs(model, name), None)
    if not per_head or config is None:
        return one
    heads = config.num_attention_heads
    dimension = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    if leaf in _KEY_VALUE:
        heads = getattr(config, "num_key_value_heads", None) or heads
    elif leaf not in _QUERY and side == "rows":
        return one
    size = linear.in_features if side == "columns" else linear.out_features
    return HeadLayout(heads, side) if heads * dimension == size else one


def _configs(model: "nn.Module", name: str) -> "Iterator[Any]":
    """Yield the configurations with a number of heads around a module, the nearest first.

    A model of several parts (image and text, say) has one for each, and attention modules carry their part's.
    """
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if isinstance(getattr(config, "num_attention_heads", None), int):
            yield config
