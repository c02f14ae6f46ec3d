"""Attention on a CPU, causal or not, in blocks of query rows, with its own backward.

torch's scaled_dot_product_attention spends most of its time outside the matrix products on a CPU at head dimension
64 in bf16, and its backward is slower still where there are few keys (docs/log.md). Here each block of query rows is
one batched product with the keys that it may see; query heads that share a key head are rows of the same product, so
keys and values are never repeated. Probabilities are kept in the input's dtype, for rows up to `KEPT_LENGTH` tokens;
longer ones are computed again in backward.

Causal attention assumes right-padded rows: no token that matters sees a padding token behind it. Knows no padding
mask, no sliding window and no dropout.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["KEPT_LENGTH", "causal_attention", "full_attention"]

KEPT_LENGTH = 512
_BLOCK = 64
_FULL_BLOCK = 128  # rows of a block where every query sees every key
_CACHE_ELEMENTS = 1 << 20  # of a block of scores: what stays in a core's second-level cache


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q k^T + causal mask) v.

    Args:
        q: [B, T, H, d].
        k: [B, L, K, d] with L >= T: queries are the last T positions. H is a multiple of K, and query head h reads
            key head h // (H / K).
        v: [B, L, K, d].
        scale: Factor on the scores, usually 1/sqrt(d).

    Returns:
        [B, T, H, d].
    """
    out: Tensor = _Attention.apply(q, k, v, scale, True)  # type: ignore[no-untyped-call]
    return out


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q k^T) v [B, T, H, d] for q [B, T, H, d] and k, v [B, L, K, d]; each query sees each key."""
    out: Tensor = _Attention.apply(q, k, v, scale, False)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        keep = k.shape[1] <= KEPT_LENGTH and any(ctx.needs_input_grad)
        before = k.shape[1] - q.shape[1]
        kept: list[Tensor] = []
        with torch.autocast(q.device.type, enabled=False):
            for rows in _groups(q, k, causal=causal):
                keys, values = _by_head(k[rows]), _by_head(v[rows])
                queries, outputs = _grouped(q[rows], k.shape[2]), _grouped(out[rows], k.shape[2])
                for start, stop in _blocks(q.shape[1], causal=causal):
                    seen = before + stop if causal else k.shape[1]
                    p = _probabilities(queries[:, :, :, start:stop], keys[:, :seen], scale, causal=causal)
                    outputs[:, :, :, start:stop] = _split(p @ values[:, :seen], outputs[:, :, :, start:stop])
                    if keep:
                        kept.append(p)
        ctx.scale, ctx.kept, ctx.causal = scale, keep, causal
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, *kept = ctx.saved_tensors
        causal = ctx.causal
        probabilities = iter(kept)
        before = k.shape[1] - q.shape[1]
        dq, dk, dv = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(k), torch.empty_like(v)
        with torch.autocast(q.device.type, enabled=False):
            for rows in _groups(q, k, causal=causal):
                keys, values = _by_head(k[rows]), _by_head(v[rows])  # [BK, T, d]
                queries, grads, dqs = (_grouped(t[rows], k.shape[2]) for t in (q, grad, dq))
                dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
                for start, stop in _blocks(q.shape[1], causal=causal):
                    block, seen = queries[:, :, :, start:stop], before + stop if causal else k.shape[1]
                    qb, gb = _joined(block), _joined(grads[:, :, :, start:stop])  # [BK, Gn, d]
                    p = (
                        next(probabilities)
                        if ctx.kept
                        else _probabilities(block, keys[:, :seen], ctx.scale, causal=causal)
                    )
                    dvalues[:, :seen].baddbmm_(p.transpose(1, 2), gb)
                    ds = torch._softmax_backward_data(gb @ values[:, :seen].transpose(1, 2), p, -1, p.dtype)
                    dkeys[:, :seen].baddbmm_(ds.transpose(1, 2), qb, alpha=ctx.scale)
                    dqb = torch.baddbmm(qb, ds, keys[:, :seen], beta=0, alpha=ctx.scale)
                    dqs[:, :, :, start:stop] = _split(dqb, block)
                dk[rows], dv[rows] = _to_rows(dkeys, k[rows]), _to_rows(dvalues, v[rows])
        return dq, dk, dv, None, None


def _groups(q: Tensor, k: Tensor, *, causal: bool) -> list[slice]:
    """Cut the batch so that a block of scores stays in the cache."""
    batch, length, heads, _ = q.shape
    rows = min(_BLOCK if causal else _FULL_BLOCK, length)
    size = max(1, _CACHE_ELEMENTS // (heads * rows * k.shape[1]))
    return [slice(start, min(batch, start + size)) for start in range(0, batch, size)]


def _blocks(length: int, *, causal: bool) -> list[tuple[int, int]]:
    count = math.ceil(length / (_BLOCK if causal else _FULL_BLOCK))
    size = math.ceil(length / count)  # 72 rows are two blocks of 36, not 64 and 8
    return [(start, min(length, start + size)) for start in range(0, length, size)]


def _by_head(x: Tensor) -> Tensor:
    """[B, T, K, d] -> [BK, T, d], contiguous."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _to_rows(x: Tensor, like: Tensor) -> Tensor:
    """[BK, T, d] -> [B, T, K, d] as a view."""
    batch, length, heads, width = like.shape
    return x.view(batch, heads, length, width).transpose(1, 2)


def _grouped(x: Tensor, key_heads: int) -> Tensor:
    """[B, T, H, d] -> [B, K, G, T, d] as a view; G query heads share a key head."""
    batch, length, heads, width = x.shape
    return x.view(batch, length, key_heads, heads // key_heads, width).permute(0, 2, 3, 1, 4)


def _joined(x: Tensor) -> Tensor:
    """[B, K, G, n, d] -> [BK, Gn, d], contiguous."""
    batch, key_heads, group, rows, width = x.shape
    return x.reshape(batch * key_heads, group * rows, width)


def _split(x: Tensor, like: Tensor) -> Tensor:
    """[BK, Gn, d] -> [B, K, G, n, d] as a view."""
    return x.view(like.shape)


def _probabilities(queries: Tensor, keys: Tensor, scale: float, *, causal: bool) -> Tensor:
    """Return softmax of the scores of a block of query rows [BK, Gn, stop], causally masked at the last keys."""
    batch, key_heads, group, rows, _ = queries.shape
    joined, stop = _joined(queries), keys.shape[1]
    scores = keys.new_empty(batch * key_heads, group * rows, stop)
    torch.baddbmm(scores, joined, keys.transpose(1, 2), beta=0, alpha=scale, out=scores)
    if causal:
        last = scores.view(batch * key_heads, group, rows, stop)[..., stop - rows :]
        last.add_(_later_keys(rows, keys.dtype, keys.device))
    return torch.softmax(scores, -1)


@lru_cache(maxsize=8)
def _later_keys(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what hides the keys behind each query: minus infinity above the diagonal, else 0."""
    return torch.full((rows, rows), -torch.inf, dtype=dtype, device=device).triu_(1)
