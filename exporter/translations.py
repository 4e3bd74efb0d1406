"""How torch ops become ONNX nodes where the stock translation does not serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnxscript import opset20, values

from exporter.functions import DOMAIN, VERSION
from plans import ops as _register_ops  # noqa: F401  (registers torch.ops.arrowhead)

_Schema = onnx.defs.OpSchema
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_LAYOUT = {
    "scale": _Schema.AttrType.FLOAT,
    "text_tokens": _Schema.AttrType.INT,
    "text_first": _Schema.AttrType.INT,
    "block": _Schema.AttrType.INT,
    "half_windows": _Schema.AttrType.INTS,
}


def custom_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Give the table for torch.onnx.export's custom_translation_table."""
    return {
        torch.ops.arrowhead.arrow_attention.default: _arrow_attention,
        torch.ops.arrowhead.cached_head.default: _cached_head,
        torch.ops.arrowhead.rotary_embedding.default: _head_rotary,
        torch.ops.aten.rms_norm.default: _head_norm,
        torch.ops.aten.linear.default: _linear,
    }


def _operator(
    name: str, inputs: Sequence[str], attributes: dict[str, Any], tables: Sequence[str] = ()
) -> values.Op:
    schema = _Schema(
        name,
        DOMAIN,
        VERSION,
        inputs=[
            *(_Schema.FormalParameter(x, "T") for x in inputs),
            *(_Schema.FormalParameter(x, "tensor(float)") for x in tables),
        ],
        outputs=[_Schema.FormalParameter("o", "T")],
        type_constraints=[("T", _FLOATS, "")],
        attributes=[_Schema.Attribute(n, kind, required=True) for n, kind in attributes.items()],
    )
    return values.Op(values.Opset(DOMAIN, VERSION), name, schema)


_ArrowAttention = _operator("ArrowAttention", "qkv", _LAYOUT)
_CachedHead = _operator(
    "CachedHead", [*"qkv", "cache"], {**_LAYOUT, "source": _Schema.AttrType.INTS}
)
_HeadNorm = _operator("HeadNorm", ["x", "weight"], {"epsilon": _Schema.AttrType.FLOAT})
_HeadRotary = _operator("HeadRotary", ["x"], {}, tables=["cos", "sin"])


def _arrow_attention(
    q: Any,
    k: Any,
    v: Any,
    scale: float,
    text_tokens: int,
    text_first: bool,
    block: int,
    half_windows: Sequence[int],
) -> Any:
    return _ArrowAttention(
        q,
        k,
        v,
        scale=scale,
        text_tokens=text_tokens,
        text_first=int(text_first),
        block=block,
        half_windows=list(half_windows),
    )


def _cached_head(
    q: Any,
    k: Any,
    v: Any,
    cache: Any,
    scale: float,
    text_tokens: int,
    text_first: bool,
    block: int,
    half_windows: Sequence[int],
    source: Sequence[int],
) -> Any:
    return _CachedHead(
        q,
        k,
        v,
        cache,
        scale=scale,
        text_tokens=text_tokens,
        text_first=int(text_first),
        block=block,
        half_windows=list(half_windows),
        source=list(source),
    )


def _head_rotary(x: Any, cos: Any, sin: Any) -> Any:
    return _HeadRotary(x, cos, sin)


def _head_norm(
    x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Any:
    # Of heads, as SD3 and FLUX have them; they have no other.
    assert len(normalized_shape) == 1 and weight is not None and eps is not None
    return _HeadNorm(x, weight, epsilon=eps)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Gemm takes the weight as the checkpoint has it, [out, in]; MatMul would need a transpose."""
    # A batch may be dynamic, and is then the one dimension that Reshape works out.
    *rows, width = (dim if isinstance(dim, int) else -1 for dim in x.shape)
    if len(rows) != 1:
        x = opset20.Reshape(x, opset20.Constant(value_ints=[-1, width]))
    y = opset20.Gemm(x, weight, bias, transB=1)
    if len(rows) != 1:
        y = opset20.Reshape(y, opset20.Constant(value_ints=[*rows, int(weight.shape[0])]))
    return y
