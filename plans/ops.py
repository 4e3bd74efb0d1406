"""The two operators as torch.library ops, so that torch.export keeps them whole.

Importing this module registers `torch.ops.arrowhead.arrow_attention` and `.cached_head`. The
implementation for every device is the reference; a kernel library adds a faster one with
`plans.ops.arrow_attention.register_kernel("cuda")`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plans import reference

_LAYOUT = "float scale, int text_tokens, bool text_first, int block, int[] half_windows"


@torch.library.custom_op(
    "arrowhead::arrow_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> Tensor",
)
def arrow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    text_tokens: int,
    text_first: bool,
    block: int,
    half_windows: Sequence[int],
) -> Tensor:
    """Attend with one half window per head: [B, S, h, D] -> [B, S, h, D] (see plans.reference)."""
    return reference.arrow_attention(
        q,
        k,
        v,
        scale=scale,
        text_tokens=text_tokens,
        text_first=text_first,
        block=block,
        half_windows=half_windows,
    )


@torch.library.custom_op(
    "arrowhead::cached_head",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor cache, {_LAYOUT}, int[] source) -> Tensor",
)
def cached_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    scale: float,
    text_tokens: int,
    text_first: bool,
    block: int,
    half_windows: Sequence[int],
    source: Sequence[int],
) -> Tensor:
    """Merge computed and cached heads: [B, S, h, D], [B, S, c, D] -> [B, S, H, D]."""
    return reference.cached_head(
        q,
        k,
        v,
        cache,
        scale=scale,
        text_tokens=text_tokens,
        text_first=text_first,
        block=block,
        half_windows=half_windows,
        source=source,
    )


@arrow_attention.register_fake
def _(q, k, v, scale, text_tokens, text_first, block, half_windows):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@cached_head.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, cache, scale, text_tokens, text_first, block, half_windows, source
):
    return q.new_empty(q.shape[0], q.shape[1], len(source), q.shape[3])
