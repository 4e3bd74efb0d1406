"""The operators on a GPU that has no kernel library: SDPA in the dtype of the activations.

Importing this module registers them; a kernel library then puts its own in their place. Same
semantics as plans.reference, whose fp32 arithmetic costs a GPU several times the time. SDPA on
CUDA multiplies in the dtype of q, k, v and accumulates in fp32. For outputs of size 1 the
difference to the reference is at most 1e-5 in fp32, 3e-3 in fp16 and 2e-2 in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plans import ops, reference
from plans.tiles import FULL, TokenLayout


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
    """Attend with one half window per head: [B, S, h, D] -> [B, S, h, D]."""
    layout = TokenLayout(q.shape[1] - text_tokens, text_tokens, text_first, block)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for half_window, heads in reference._groups(layout, half_windows).items():
        mask = None
        if half_window != FULL:
            mask = reference.arrow_mask(layout, half_window, q.device)
        pick = reference._slice_or_index(heads, q.device)
        pq, pk, pv = (x[:, :, pick].transpose(1, 2) for x in (q, k, v))
        part = F.scaled_dot_product_attention(pq, pk, pv, attn_mask=mask, scale=scale)
        out[:, :, pick] = part.transpose(1, 2)
    return out


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
    computed = arrow_attention(q, k, v, scale, text_tokens, text_first, block, half_windows)
    both = torch.cat([computed, cache.to(q.dtype)], dim=2)
    return both.index_select(2, reference._index(tuple(source), q.device))


def attend(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    cache: Sequence[Tensor],
    tasks: Tensor,
    scale: float,
    text_tokens: int,
    text_first: bool,
    block: int,
) -> list[Tensor]:
    """plans.ops.attend; it reads the tasks on the host, so it cannot be captured in a graph."""
    out = ops.run_tasks(
        arrow_attention, q, k, v, cache, tasks, scale, text_tokens, text_first, block
    )
    return ops.split_tokens(out, len(q), text_tokens, text_first)


def register() -> None:
    """Make these the operators on CUDA, until a kernel library registers its own."""
    ops.attend.register_kernel("cuda")(attend)
    ops.arrow_attention.register_kernel("cuda")(arrow_attention)
    ops.cached_head.register_kernel("cuda")(cached_head)


register()
