"""The operators as torch.library ops, so that torch.export and torch.compile keep them whole.

Importing this module registers `torch.ops.arrowhead.arrow_attention`, `.cached_head` and
`.rotary_embedding`, which exported graphs hold, and `.attend` and `.linear_gelu`, which compiled
transformers call. The implementation for every device is the reference; a kernel library adds a
faster one with `plans.ops.arrow_attention.register_kernel("cuda")`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plans import reference
from plans.tiles import CACHED

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


@torch.library.custom_op(
    "arrowhead::rotary_embedding",
    mutates_args=(),
    schema="(Tensor x, Tensor cos, Tensor sin) -> Tensor",
)
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of each head by its token's angles, in fp32: [B, S, h, D] -> [B, S, h, D].

    cos, sin: fp32 [S, D]. For graphs, which hold it whole: diffusers' own takes eleven operators.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x, (cos, sin), sequence_dim=1)


@rotary_embedding.register_fake
def _(x, cos, sin):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "arrowhead::attend",
    mutates_args=(),
    schema=(
        "(Tensor[] q, Tensor[] k, Tensor[] v, Tensor[] cache, Tensor tasks, float scale, "
        "int text_tokens, bool text_first, int block) -> Tensor[]"
    ),
)
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
    """Do what `tasks` says of each output head; tokens lie in one tensor or in two.

    q, k, v, cache: [joint] or [text, image], each [B, S, h, D]; cache may be empty. The result has
    the form of q. tasks: int32 [H, 3], per output head (mode, its head in q, k, v or, where it is
    cached, in cache, -1), on the device of q: an input, so that one graph serves every plan.
    """
    return split_tokens(
        run_tasks(arrow_attention, q, k, v, cache, tasks, scale, text_tokens, text_first, block),
        len(q), text_tokens, text_first,
    )  # fmt: skip


@attend.register_fake
def _(q, k, v, cache, tasks, scale, text_tokens, text_first, block):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape[0], x.shape[1], tasks.shape[0], x.shape[3]) for x in q]


def run_tasks(
    attention: Callable[..., Tensor],
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    cache: Sequence[Tensor],
    tasks: Tensor,
    scale: float,
    text_tokens: int,
    text_first: bool,
    block: int,
) -> Tensor:
    """Give `attend`'s result in one tensor, by an `attention` that has arrow_attention's form."""
    q, k, v, cache = (join_tokens(x, text_first) for x in (q, k, v, cache))
    rows = tasks.tolist()
    out = q[0].new_empty(*q[0].shape[:2], len(rows), q[0].shape[3])
    computed = [head for head, row in enumerate(rows) if row[0] != CACHED]
    kept = [head for head, row in enumerate(rows) if row[0] == CACHED]
    if computed:
        source = [rows[head][1] for head in computed]
        modes = [rows[head][0] for head in computed]
        parts = (x[0][:, :, source] for x in (q, k, v))
        out[:, :, computed] = attention(*parts, scale, text_tokens, text_first, block, modes)
    if kept:
        out[:, :, kept] = cache[0][:, :, [rows[head][1] for head in kept]]
    return out


def join_tokens(parts: Sequence[Tensor], text_first: bool) -> list[Tensor]:
    """Put [text, image] into one tensor, in the module's order."""
    if len(parts) < 2:
        return list(parts)
    return [torch.cat(list(parts) if text_first else [parts[1], parts[0]], dim=1)]


def split_tokens(x: Tensor, parts: int, text_tokens: int, text_first: bool) -> list[Tensor]:
    """Undo join_tokens; every part is contiguous and its own memory."""
    if parts == 1:
        return [x]
    first = text_tokens if text_first else x.shape[1] - text_tokens
    head, tail = x[:, :first].clone(), x[:, first:].clone()
    return [head, tail] if text_first else [tail, head]


@torch.library.custom_op(
    "arrowhead::linear_gelu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor",
)
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Project, then apply the tanh-approximated GELU: [..., C] -> [..., N].

    On CUDA in half precision it is the epilogue of the multiplication, so what is projected is
    written once.
    """
    if x.is_cuda and x.dtype != torch.float32:
        flat = x.reshape(-1, x.shape[-1])
        return torch._addmm_activation(bias, flat, weight.t(), use_gelu=True).view(
            *x.shape[:-1], weight.shape[0]
        )
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@linear_gelu.register_fake
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])
