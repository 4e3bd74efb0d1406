"""The fused kernel as the CUDA implementation of torch.ops.arrowhead.*.

`launch` is the whole kernel: any mix of modes, tensors in one piece or as (text, image) pairs, a
second output. `register` puts it behind the operators that plans.ops defines. Nothing here
synchronises, so calls can be captured in a CUDA graph, and the operators are opaque to
torch.compile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from plans import ops, reference, sdpa
from plans.errors import ArrowheadError
from plans.tiles import CACHED
from plugins.torch.library import (
    AUTO,
    MAX_HEADS,
    AttentionParams,
    HeadTask,
    SegmentViews,
    TensorView,
    load_library,
)

Tokens = Tensor | tuple[Tensor | None, Tensor | None]  # [B, S, h, D], or text and image apart
DTYPES = {torch.float16: 0, torch.bfloat16: 1}  # plugins/kernels/params.h: Element
_WORKSPACE_BYTES = 16


def tasks_of(
    half_windows: Sequence[int], source: Sequence[int] | None = None, second: Sequence[int] = ()
) -> Any:
    """Make the kernel's task array: one entry per output head.

    source: as in plans.reference.cached_head; None means the computed heads in order.
    second: for each output head its head in the second output, or -1.
    """
    return _tasks(
        tuple(half_windows),
        tuple(range(len(half_windows)) if source is None else source),
        tuple(second),
    )


@lru_cache(maxsize=1024)  # one entry per (module kind, bucket) of a plan
def _tasks(half_windows: tuple[int, ...], source: tuple[int, ...], second: tuple[int, ...]) -> Any:
    tasks = (HeadTask * MAX_HEADS)()
    computed = len(half_windows)
    for head, index in enumerate(source):
        target = second[head] if second else -1
        if index < computed:
            tasks[head] = HeadTask(half_windows[index], index, target)
        else:
            tasks[head] = HeadTask(CACHED, index - computed, target)
    return tasks


def launch(
    q: Tokens,
    k: Tokens,
    v: Tokens,
    out: Tokens,
    tasks: Any,
    *,
    scale: float,
    text_tokens: int,
    text_first: bool,
    block: int,
    cache: Tokens | None = None,
    second: Tokens | None = None,
    kernel: int = AUTO,
) -> None:
    """Run the kernel on the current stream: [B, S, h, D] tensors in, `out` [B, S, H, D] written.

    tasks: from tasks_of, or an int32 tensor [H, 3] (mode, source, second) on the device.
    Text None in `out` leaves the text rows out. Raises ArrowheadError where the library refuses.
    """
    sample = next(x for x in (out if isinstance(out, tuple) else (out,)) if x is not None)
    text_first = text_first and text_tokens > 0
    tokens = _tokens(out, text_tokens)
    params = AttentionParams()
    params.struct_size = ctypes.sizeof(AttentionParams)
    params.element = DTYPES[sample.dtype]
    params.kernel = kernel
    params.batch, params.heads, params.head_dim = sample.shape[0], sample.shape[2], sample.shape[3]
    params.image_tokens, params.text_tokens, params.block = tokens, text_tokens, block
    params.qkv_heads = _heads(q)
    params.cache_heads = _heads(cache)
    params.second_heads = _heads(second)
    params.scale = scale
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out), ("second", second),
                    ("cache", cache)):  # fmt: skip
        if x is not None:
            setattr(params, name, _views(x, text_tokens, tokens, text_first))
    if isinstance(tasks, Tensor):
        params.device_tasks = tasks.data_ptr()
    else:
        params.tasks = tasks
    workspace = torch.empty(_WORKSPACE_BYTES // 4, dtype=torch.int32, device=sample.device)
    params.workspace = workspace.data_ptr()
    with torch.cuda.device(sample.device):
        stream = torch.cuda.current_stream().cuda_stream
        library = load_library()
        error = library.arrowhead_attention(ctypes.byref(params), ctypes.c_void_p(stream))
    if error:
        raise ArrowheadError(
            "arrow attention kernel",
            got=f"{library.arrowhead_error_string(error).decode()} for q {_shape(q)}, "
            f"out {_shape(out)}, {text_tokens} text tokens, {sample.dtype}",
            expected="a device of compute capability 8.0 or higher, head_dim 64 or 128, "
            "fp16 or bf16, 16-byte aligned rows",
            fix="use the plans.reference or plans.sdpa operators for other tensors",
        )


def _tokens(x: Tokens, text_tokens: int) -> int:
    """Image tokens."""
    if isinstance(x, tuple):
        return 0 if x[1] is None else x[1].shape[1]
    return x.shape[1] - text_tokens


def _heads(x: Tokens | None) -> int:
    parts = x if isinstance(x, tuple) else (x,)
    return next((part.shape[2] for part in parts if part is not None), 0)


def _shape(x: Tokens) -> list[Any]:
    parts = x if isinstance(x, tuple) else (x,)
    return [None if part is None else list(part.shape) for part in parts]


def _views(x: Tokens, text_tokens: int, image_tokens: int, text_first: bool) -> SegmentViews:
    if isinstance(x, tuple):
        return SegmentViews(*(TensorView() if part is None else _view(part, 0) for part in x))
    text = _view(x, 0 if text_first else image_tokens) if text_tokens else TensorView()
    image = _view(x, text_tokens if text_first else 0) if image_tokens else TensorView()
    return SegmentViews(text, image)


def _view(x: Tensor, first_token: int) -> TensorView:
    # The stride of an axis of one means nothing; torch leaves anything there.
    batch, token, head, _ = (s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))
    offset = first_token * x.stride(1) * x.element_size()
    return TensorView(x.data_ptr() + offset, batch, token, head)


def is_loadable(x: Tensor) -> bool:
    """Say whether the kernel can read [B, S, h, D] where it lies, without a copy."""
    strides = [s for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1]
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides)


def _loadable(x: Tensor) -> Tensor:
    return x if is_loadable(x) else x.clone(memory_format=torch.contiguous_format)


def _supports(q: Tensor, k: Tensor, v: Tensor, heads: int, cache: Tensor | None = None) -> bool:
    """Say whether the kernel takes these; it is told q's sizes only, so all must share them."""
    kept = q if cache is None else cache
    return (
        q.dtype in DTYPES
        and q.shape[3] in (64, 128)
        and 1 <= heads <= MAX_HEADS
        and all((x.shape, x.dtype, x.device) == (q.shape, q.dtype, q.device) for x in (k, v))
        and kept.device == q.device
        and (kept.shape[:2], kept.shape[3]) == (q.shape[:2], q.shape[3])
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
    """plans.reference.arrow_attention by the fused kernel: [B, S, h, D] -> [B, S, h, D].

    What the kernel does not take (fp32, other head dims) goes to plans.sdpa, here and below.
    """
    if not _supports(q, k, v, q.shape[2]):
        return sdpa.arrow_attention(q, k, v, scale, text_tokens, text_first, block, half_windows)
    reference._check(q, text_tokens, block, half_windows)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch(
        _loadable(q), _loadable(k), _loadable(v), out, tasks_of(half_windows),
        scale=scale, text_tokens=text_tokens, text_first=text_first, block=block,
    )  # fmt: skip
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
    """plans.reference.cached_head by the fused kernel: one launch computes, copies and merges."""
    if not _supports(q, k, v, len(source), cache):
        return sdpa.cached_head(
            q, k, v, cache, scale, text_tokens, text_first, block, half_windows, source
        )
    reference._check(q, text_tokens, block, half_windows)
    out = q.new_empty(q.shape[0], q.shape[1], len(source), q.shape[3])
    launch(
        _loadable(q), _loadable(k), _loadable(v), out, tasks_of(half_windows, source),
        scale=scale, text_tokens=text_tokens, text_first=text_first, block=block,
        cache=_loadable(cache.to(q.dtype)),
    )  # fmt: skip
    return out


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
    """plans.ops.attend in one launch: no concatenation, no split, tasks read on the device."""
    sample = q[0]
    if sample.dtype not in DTYPES or sample.shape[3] not in (64, 128):
        return sdpa.attend(q, k, v, cache, tasks, scale, text_tokens, text_first, block)
    out = [x.new_empty(x.shape[0], x.shape[1], tasks.shape[0], x.shape[3]) for x in q]
    launch(
        _pair(q), _pair(k), _pair(v), _pair(out), tasks, scale=scale, text_tokens=text_tokens,
        text_first=text_first, block=block, cache=_pair(cache) if cache else None,
    )  # fmt: skip
    return out


def _pair(parts: Sequence[Tensor]) -> Tokens:
    loadable = [_loadable(x) for x in parts]
    return loadable[0] if len(loadable) == 1 else (loadable[0], loadable[1])


def register() -> None:
    """Make the kernel the CUDA implementation of the operators. Loads the library."""
    load_library()
    ops.attend.register_kernel("cuda")(attend)
    ops.arrow_attention.register_kernel("cuda")(arrow_attention)
    ops.cached_head.register_kernel("cuda")(cached_head)
