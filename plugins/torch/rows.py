"""Norm and rotation of heads by the library's kernels, on CUDA tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from plans.errors import ArrowheadError
from plugins.torch.library import load_library

_ELEMENTS = {torch.float16: 0, torch.bfloat16: 1}


class RowParams(ctypes.Structure):
    """kernels/params.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("element", "batch", "tokens", "heads", "head_dim")),
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, out: Tensor | None = None) -> Tensor:
    """Give x / sqrt(mean(x^2) + epsilon) * weight: [B, S, h, D], contiguous; weight [D].

    fp16 or bf16, all on one device. Raises ArrowheadError for others, for rows that are not
    contiguous, and where the kernel refuses: D that is no power of two from 8 to 256.
    """
    launch = load_library().arrowhead_rms_norm
    rest = (ctypes.c_void_p(weight.data_ptr()), ctypes.c_float(epsilon))
    return _launch(launch, x, out, *rest)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Turn pairs of D by each token's angles: x [B, S, h, D], contiguous; cos, sin fp32 [S, D].

    Raises ArrowheadError as rms_norm does.
    """
    launch = load_library().arrowhead_rotary
    rest = (ctypes.c_void_p(table.data_ptr()) for table in (cos, sin))
    return _launch(launch, x, out, *rest)


def _launch(launch: Callable[..., int], x: Tensor, out: Tensor | None, *rest: object) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    if x.dtype not in _ELEMENTS or x.dim() != 4 or not (x.is_contiguous() and out.is_contiguous()):
        raise _refusal(x, "rows that the kernel does not take")
    params = RowParams(_ELEMENTS[x.dtype], *x.shape, x.data_ptr(), out.data_ptr())
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
    error = launch(ctypes.byref(params), *rest, stream)
    if error:
        raise _refusal(x, load_library().arrowhead_error_string(error).decode())
    return out


def _refusal(x: Tensor, why: str) -> ArrowheadError:
    return ArrowheadError(
        "rows of heads",
        got=f"{why}: {x.dtype} {list(x.shape)}, strides {list(x.stride())}",
        expected="fp16 or bf16 [B, S, heads, D], contiguous, D a power of two from 8 to 256, at "
        "multiples of 16 bytes",
        fix="use PyTorch's own operators for these",
    )
