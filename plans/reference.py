"""The fp32 truth of both attentions; every other implementation is measured against this file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from plans.errors import ArrowheadError
from plans.tiles import FULL, TokenLayout


@lru_cache(maxsize=8)  # S x S bytes each: 1.3 MB for 1K tokens, 285 MB for a 2K FLUX picture
def arrow_mask(layout: TokenLayout, half_window: int, device: torch.device | str = "cpu") -> Tensor:
    """Say which key (column) each query (row) attends: bool [S, S].

    Text attends and is attended by everything; image block a attends image block b
    iff |a - b| <= half_window. Blocks are counted from the first image token.
    """
    block = torch.arange(layout.image_tokens, device=device) // layout.block
    mask = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool, device=device)
    first, last = layout.image_offset, layout.image_offset + layout.image_tokens
    mask[first:last, first:last] = (block[:, None] - block[None, :]).abs() <= half_window
    return mask


def arrow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    text_tokens: int,
    text_first: bool,
    block: int,
    half_windows: Sequence[int],
) -> Tensor:
    """Attend with one half window (in blocks; -1 full) per head.

    q, k, v: [B, S, h, D], any float dtype. The arithmetic is fp32; the result [B, S, h, D] is
    contiguous and in q's dtype. Raises ArrowheadError where the attributes do not fit the tensors.
    """
    _check(q, text_tokens, block, half_windows)
    layout = TokenLayout(q.shape[1] - text_tokens, text_tokens, text_first, block)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for half_window, heads in _groups(layout, half_windows).items():
        mask = None if half_window == FULL else arrow_mask(layout, half_window, q.device)
        pick = _slice_or_index(heads, q.device)
        pq, pk, pv = (x[:, :, pick].transpose(1, 2).float() for x in (q, k, v))
        part = F.scaled_dot_product_attention(pq, pk, pv, attn_mask=mask, scale=scale)
        out[:, :, pick] = part.transpose(1, 2).to(q.dtype)
    return out


def cached_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    *,
    scale: float,
    text_tokens: int,
    text_first: bool,
    block: int,
    half_windows: Sequence[int],
    source: Sequence[int],
) -> Tensor:
    """Attend on the computed heads and take the others from the cache.

    q, k, v: [B, S, h, D]; cache: [B, S, c, D]; result [B, S, H, D] in q's dtype, where output
    head i is concat(computed, cache; heads axis)[source[i]].
    """
    heads = q.shape[2] + cache.shape[2]
    if not source or not all(0 <= index < heads for index in source):
        raise ArrowheadError(
            "cached_head: source",
            got=list(source),
            expected=f"one index in 0..{heads - 1} per output head",
            fix="count the computed heads first, then the heads of the cache",
        )
    computed = arrow_attention(
        q,
        k,
        v,
        scale=scale,
        text_tokens=text_tokens,
        text_first=text_first,
        block=block,
        half_windows=half_windows,
    )
    both = torch.cat([computed, cache.to(q.dtype)], dim=2)
    return both.index_select(2, _index(tuple(source), q.device))


def _check(q: Tensor, text_tokens: int, block: int, half_windows: Sequence[int]) -> None:
    if len(half_windows) != q.shape[2] or any(w < FULL for w in half_windows):
        raise ArrowheadError(
            "arrow_attention: half_windows",
            got=list(half_windows),
            expected=f"{q.shape[2]} integers, each >= -1 (one per computed head)",
            fix="pass the half windows of the computed heads only; cached heads have none",
        )
    if not 0 <= text_tokens <= q.shape[1] or block < 1:
        raise ArrowheadError(
            "arrow_attention: token layout",
            got=f"text_tokens={text_tokens}, block={block} with {q.shape[1]} tokens",
            expected="0 <= text_tokens <= S and block >= 1",
            fix="pass the layout of the attention module the tensors come from",
        )


def _groups(layout: TokenLayout, half_windows: Sequence[int]) -> dict[int, list[int]]:
    """Heads by half window; windows that reach every block count as full, which needs no mask."""
    groups: dict[int, list[int]] = {}
    for head, half_window in enumerate(half_windows):
        key = FULL if half_window >= layout.blocks - 1 else half_window
        groups.setdefault(key, []).append(head)
    return groups


def _slice_or_index(heads: list[int], device: torch.device) -> slice | Tensor:
    if heads[-1] - heads[0] + 1 == len(heads):
        return slice(heads[0], heads[-1] + 1)
    return _index(tuple(heads), device)


@lru_cache(maxsize=256)  # tiny tensors; saves a host-to-device copy per call
def _index(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
