"""libarrowhead.so through ctypes: the structs of plugins/kernels/params.h, field by field."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from plans.errors import ArrowheadError

VARIABLE = "ARROWHEAD_LIBRARY"
BUILT = Path(__file__).parents[2] / "build" / "plugins" / "libarrowhead.so"
MAX_HEADS = 128

AUTO, SM90, SM90_WIDE, MMA_SYNC = range(4)  # plugins/kernels/params.h: Kernel


class TensorView(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    ]


class SegmentViews(ctypes.Structure):
    _fields_ = [("text", TensorView), ("image", TensorView)]


class HeadTask(ctypes.Structure):
    _fields_ = [("mode", ctypes.c_int32), ("source", ctypes.c_int32), ("second", ctypes.c_int32)]


class TokenLayout(ctypes.Structure):
    _fields_ = [
        ("image_tokens", ctypes.c_int),
        ("text_tokens", ctypes.c_int),
        ("block", ctypes.c_int),
    ]


_INTEGERS = (
    "struct_size", "element", "kernel", "batch", "heads", "head_dim", "image_tokens",
    "text_tokens", "block", "qkv_heads", "cache_heads", "second_heads",
)  # fmt: skip


class AttentionParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in _INTEGERS),
        ("scale", ctypes.c_float),
        *((name, SegmentViews) for name in ("q", "k", "v", "out", "second", "cache")),
        ("device_tasks", ctypes.c_void_p),
        ("tasks", HeadTask * MAX_HEADS),
        ("workspace", ctypes.c_void_p),
    ]


def find_library() -> Path | None:
    """Return the kernel library's path: the variable's, or the one `make plugins` builds."""
    named = os.environ.get(VARIABLE)
    path = Path(named) if named else BUILT
    return path if path.is_file() else None


@cache
def load_library() -> ctypes.CDLL:
    """Load the kernel library once. Raises ArrowheadError if it is absent or of another version."""
    path = find_library()
    if path is None:
        raise ArrowheadError(
            "kernel library",
            got=f"no file at {os.environ.get(VARIABLE) or BUILT}",
            expected="libarrowhead.so",
            fix=f"run `make plugins` (needs nvcc), or set {VARIABLE} to its path",
        )
    try:
        library = ctypes.CDLL(str(path))
        library.arrowhead_error_string.restype = ctypes.c_char_p
        library.arrowhead_attention.argtypes = [ctypes.POINTER(AttentionParams), ctypes.c_void_p]
        size = library.arrowhead_params_size()
    except (OSError, AttributeError) as error:
        raise ArrowheadError(
            "kernel library",
            got=f"another kind of file ({error})",
            expected="libarrowhead.so for this machine's processor",
            fix="build it on this machine: `make plugins`",
        ) from error
    if size != ctypes.sizeof(AttentionParams):
        raise ArrowheadError(
            "kernel library",
            got=f"{path} with parameters of {size} bytes",
            expected=f"{ctypes.sizeof(AttentionParams)} bytes",
            fix="build it again from this source: `make plugins`",
        )
    return library


def build_id() -> str:
    """Which build of the kernels the library holds."""
    function = load_library().arrowhead_build_id
    function.restype = ctypes.c_char_p
    return function().decode()
