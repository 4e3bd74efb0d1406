"""The operators as ONNX functions in standard operators.

Every model file carries them, so a runtime without a kernel for the operators still runs the graph.
The bodies hold for any batch, token count and attribute; what depends on attributes and shapes
alone is folded to constants by the runtime when it loads the graph.

Full heads are plain attention. Arrow heads are computed by band: image queries in tiles of whole
blocks against a window of image keys gathered per tile, and against the text keys. The mask is
applied to the window only, and has one row per tile where a tile is one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import FunctionProto, NodeProto, TensorProto, helper

DOMAIN = "arrowhead"
VERSION = 1
OPSET = 20

ATTENTION = ("ArrowAttention", "CachedHead")
LAYOUT_ATTRIBUTES = ("scale", "text_tokens", "text_first", "block", "half_windows")

# Heads are grouped by half window; the last group takes all that are left, at the widest window
# among them. The search offers three windows, so its plans waste nothing.
_BANDS = 3

# A query tile has at least this many tokens: the matrix products are too small below.
_MIN_TILE_TOKENS = 32

# Sorts full heads before any half window.
_FULL_KEY = 2**40

# Added to masked scores. Finite, so that a row of padding, masked throughout, gives no NaN.
_MASKED = -1e30


def function_protos() -> list[FunctionProto]:
    """Build the function bodies of the operators."""
    return [_arrow_attention(), _cached_head(), _head_norm(), _head_rotary()]


def _arrow_attention() -> FunctionProto:
    body = _Body()
    out = _attention(body, "q", "k", "v")
    body.emit("Identity", out, name="o")
    return _function("ArrowAttention", ["q", "k", "v"], "o", LAYOUT_ATTRIBUTES, body)


def _cached_head() -> FunctionProto:
    body = _Body()
    computed = _attention(body, "q", "k", "v")
    both = body.Concat(computed, "cache", axis=2)
    source = body.attribute("source", "value_ints")
    body.emit("Gather", both, source, name="merged", axis=2)
    attributes = (*LAYOUT_ATTRIBUTES, "source")
    return _function("CachedHead", ["q", "k", "v", "cache"], "merged", attributes, body)


# Not ONNX 23's RMSNormalization and RotaryEmbedding: TensorRT's parser knows these by name alone,
# and its RotaryEmbedding refuses fp32 tables beside 16-bit heads.
def _head_norm() -> FunctionProto:
    body = _Body()
    x, weight = (body.Cast(name, to=TensorProto.FLOAT) for name in ("x", "weight"))
    mean = body.ReduceMean(body.Pow(x, body.floating(2.0)), body.ints(-1), keepdims=1)
    epsilon = body.attribute("epsilon", "value_float")
    normal = body.Div(x, body.Sqrt(body.Add(mean, epsilon)))
    body.emit("CastLike", body.Mul(normal, weight), "x", name="o")
    return _function("HeadNorm", ["x", "weight"], "o", ("epsilon",), body)


def _head_rotary() -> FunctionProto:
    body = _Body()
    pairs = body.Reshape("x", body.ints(0, 0, 0, -1, 2))
    last, split = body.ints(-1), [body.ints(end) for end in range(3)]
    a, b = (body.Slice(pairs, split[i], split[i + 1], last) for i in range(2))
    turned = body.Reshape(body.Concat(body.Neg(b), a, axis=-1), body.Shape("x"))
    cos, sin = (body.Unsqueeze(table, body.ints(0, 2)) for table in ("cos", "sin"))
    products = (
        body.Mul(body.Cast(x, to=TensorProto.FLOAT), table)
        for x, table in (("x", cos), (turned, sin))
    )
    body.emit("CastLike", body.Add(*products), "x", name="o")
    return _function("HeadRotary", ["x", "cos", "sin"], "o", (), body)


def _function(
    name: str, inputs: Sequence[str], output: str, attributes: Sequence[str], body: _Body
) -> FunctionProto:
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(
        DOMAIN, name, inputs, [output], body.nodes, opsets, attributes=attributes
    )


class _Body:
    """Collects nodes: `body.MatMul(a, b)` appends one and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self._constants: dict[Any, str] = {}

    def emit(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def __getattr__(self, op_type: str) -> Any:
        return lambda *inputs, **attributes: self.emit(op_type, *inputs, **attributes)

    def attribute(self, name: str, kind: str) -> str:
        """The value of a function attribute as a tensor."""
        node = helper.make_node("Constant", [], [f"attribute_{name}"])
        types = {
            "value_int": onnx.AttributeProto.INT,
            "value_ints": onnx.AttributeProto.INTS,
            "value_float": onnx.AttributeProto.FLOAT,
        }
        reference = onnx.AttributeProto(name=kind, type=types[kind], ref_attr_name=name)
        node.attribute.append(reference)
        self.nodes.append(node)
        return node.output[0]

    def top_k(self, x: str, k: str) -> tuple[str, str]:
        """The k greatest values, descending, and where they were."""
        values, indices = f"TopK_{len(self.nodes)}", f"TopK_indices_{len(self.nodes)}"
        self.nodes.append(helper.make_node("TopK", [x, k], [values, indices], axis=0))
        return values, indices

    def ints(self, *values: int) -> str:
        """A constant int64 tensor [n]."""
        if values not in self._constants:
            self._constants[values] = self.emit("Constant", value_ints=list(values))
        return self._constants[values]

    def floating(self, value: float) -> str:
        return self.emit("Constant", value_float=value)

    def span(self, end: str) -> str:
        """0, 1, .. end-1, for an int64 tensor [1]."""
        scalar = [self.Squeeze(x, self.ints(0)) for x in (self.ints(0), end, self.ints(1))]
        return self.Range(*scalar)

    def ceil_div(self, a: str, b: str) -> str:
        return self.Div(self.Sub(self.Add(a, b), self.ints(1)), b)

    def reshape(self, x: str, *dims: int | str) -> str:
        """Reshape to constants and int64 tensors [1]; a 0 is a dimension of no elements."""
        parts = [self.ints(d) if isinstance(d, int) else d for d in dims]
        return self.Reshape(x, self.Concat(*parts, axis=0), allowzero=1)


class _Layout:
    """Token counts and attributes as int64 tensors [1]."""

    def __init__(self, body: _Body, q: str) -> None:
        def one(name: str) -> str:
            return body.Reshape(body.attribute(name, "value_int"), body.ints(1))

        self.batch, self.seq, _, self.head_dim = (
            body.Shape(q, start=i, end=i + 1) for i in range(4)
        )
        self.text = one("text_tokens")
        self.block = one("block")
        self.image = body.Sub(self.seq, self.text)
        self.blocks = body.ceil_div(self.image, self.block)
        text_first = one("text_first")
        self.image_start = body.Mul(text_first, self.text)
        self.text_start = body.Mul(body.Sub(body.ints(1), text_first), self.image)
        self.text_end = body.Add(self.text_start, self.text)


def _attention(body: _Body, q: str, k: str, v: str) -> str:
    """[B, S, h, D] -> [B, S, h, D] with the arithmetic in fp32."""
    layout = _Layout(body, q)
    heads_first = [
        body.Transpose(body.Cast(x, to=TensorProto.FLOAT), perm=[0, 2, 1, 3]) for x in (q, k, v)
    ]
    heads_first[0] = body.Mul(heads_first[0], body.attribute("scale", "value_float"))
    keys, order, place = _sort_heads(body, layout)
    heads, start, outputs = body.Shape(keys), body.ints(0), []
    for group in range(1 + _BANDS):
        left = body.Slice(keys, start, heads)
        # The widest window left. 0 if no head is left: the group is empty and costs nothing.
        widest = body.ReduceMax(body.Concat(left, body.ints(0), axis=0), keepdims=1)
        same = body.Equal(left, body.ints(_FULL_KEY) if group == 0 else widest)
        count = body.ReduceSum(body.Cast(same, to=TensorProto.INT64), keepdims=1)
        end = body.Add(start, count) if group < _BANDS else heads
        picked = body.Slice(order, start, end)
        gq, gk, gv = (body.Gather(x, picked, axis=1) for x in heads_first)
        if group == 0:
            outputs.append(_dense(body, gq, gk, gv))
        else:
            half_windows = body.Slice(keys, start, end)
            outputs.append(_banded(body, layout, gq, gk, gv, half_windows, widest))
        start = end
    merged = body.Gather(body.Concat(*outputs, axis=1), place, axis=1)
    return body.CastLike(body.Transpose(merged, perm=[0, 2, 1, 3]), q)


def _sort_heads(body: _Body, layout: _Layout) -> tuple[str, str, str]:
    """Half windows, widest first and full before all; the heads in that order; its inverse."""
    windows = body.attribute("half_windows", "value_ints")
    # A window that reaches every block is full attention.
    reaches_all = body.GreaterOrEqual(windows, body.Sub(layout.blocks, body.ints(1)))
    is_full = body.Or(body.Less(windows, body.ints(0)), reaches_all)
    heads = body.Shape(windows)
    keys, order = body.top_k(body.Where(is_full, body.ints(_FULL_KEY), windows), heads)
    return keys, order, body.ScatterElements(order, order, body.span(heads), axis=0)


def _scores(body: _Body, q: str, k: str, rank: int = 4) -> str:
    perm = [*range(rank - 2), rank - 1, rank - 2]
    return body.MatMul(q, body.Transpose(k, perm=perm))


def _dense(body: _Body, q: str, k: str, v: str) -> str:
    return body.MatMul(body.Softmax(_scores(body, q, k), axis=-1), v)


def _banded(
    body: _Body, layout: _Layout, q: str, k: str, v: str, half_windows: str, widest: str
) -> str:
    """[B, n, S, D] -> [B, n, S, D] for n heads whose half windows are at most `widest`."""
    token_axis = body.ints(2)
    text_q, text_k, text_v = (
        body.Slice(x, layout.text_start, layout.text_end, token_axis) for x in (q, k, v)
    )
    text_out = _dense(body, text_q, k, v)

    tiles = _Tiles(body, layout, half_windows, widest)
    image_q = tiles.image_rows(q, tiles.query_rows)
    near_scores = _scores(body, tiles.by_tile(image_q, layout.head_dim), tiles.windows(k), rank=5)
    near = body.Add(tiles.by_block(near_scores, tiles.window), tiles.mask())
    far = tiles.by_block(_scores(body, image_q, text_k), layout.text)
    weights = body.Softmax(body.Concat(near, far, axis=-1), axis=-1)

    last_axis, end = body.ints(5), body.Add(tiles.window, layout.text)
    near = tiles.by_tile(body.Slice(weights, body.ints(0), tiles.window, last_axis), tiles.window)
    far = tiles.by_row(body.Slice(weights, tiles.window, end, last_axis), layout.text)
    out = body.Add(
        tiles.by_row(body.MatMul(near, tiles.windows(v)), layout.head_dim), body.MatMul(far, text_v)
    )
    out = body.Slice(out, body.ints(0), layout.image, token_axis)
    before = body.Slice(text_out, body.ints(0), layout.image_start, token_axis)
    after = body.Slice(text_out, layout.image_start, layout.text, token_axis)
    return body.Concat(before, out, after, axis=2)


class _Tiles:
    """Image queries in tiles of whole blocks, and for each tile the window of keys it may see."""

    def __init__(self, body: _Body, layout: _Layout, half_windows: str, widest: str) -> None:
        self.body, self.layout, self.half_windows = body, layout, half_windows
        self.heads = body.Shape(half_windows)
        one, two = body.ints(1), body.ints(2)
        least = body.Div(body.ints(_MIN_TILE_TOKENS), layout.block)
        self.tile_blocks = body.Max(one, least, widest)
        self.tiles = body.ceil_div(layout.blocks, self.tile_blocks)
        self.tile = body.Mul(self.tile_blocks, layout.block)
        reach = body.Add(self.tile_blocks, body.Mul(two, widest))
        self.window_blocks = body.Min(reach, layout.blocks)
        self.window = body.Mul(self.window_blocks, layout.block)
        self.query_rows = body.Mul(self.tiles, self.tile)
        self.key_rows = body.Mul(layout.blocks, layout.block)
        # Windows are moved inwards at the picture's edges, so all have one size.
        first = body.Sub(body.Mul(body.span(self.tiles), self.tile_blocks), widest)
        last_start = body.Sub(layout.blocks, self.window_blocks)
        first = body.Min(body.Max(first, body.ints(0)), last_start)
        self.key_blocks = body.Add(body.Unsqueeze(first, one), body.span(self.window_blocks))

    def image_rows(self, x: str, rows: str) -> str:
        """[B, n, S, D] -> [B, n, rows, D]: the image tokens and zeros after them."""
        body, layout = self.body, self.layout
        text_after = body.Sub(layout.text, layout.image_start)
        back = body.Sub(rows, body.Add(layout.image, text_after))
        pads = body.Concat(body.Neg(layout.image_start), back, axis=0)
        return body.Pad(x, pads, "", body.ints(2))

    def windows(self, x: str) -> str:
        """[B, n, S, D] -> [B, n, tiles, window, D]."""
        layout = self.layout
        rows = self.image_rows(x, self.key_rows)
        blocks = self._reshape(rows, layout.blocks, layout.block, layout.head_dim)
        gathered = self.body.Gather(blocks, self.key_blocks, axis=2)
        return self._reshape(gathered, self.tiles, self.window, layout.head_dim)

    def by_tile(self, x: str, width: str) -> str:
        """Rows in any shape -> [B, n, tiles, tile, width]."""
        return self._reshape(x, self.tiles, self.tile, width)

    def by_row(self, x: str, width: str) -> str:
        """Rows in any shape -> [B, n, rows, width]."""
        return self._reshape(x, self.query_rows, width)

    def by_block(self, x: str, width: str) -> str:
        """Rows in any shape -> [B, n, tiles, tile_blocks, block, width]."""
        return self._reshape(x, self.tiles, self.tile_blocks, self.layout.block, width)

    def _reshape(self, x: str, *dims: str) -> str:
        return self.body.reshape(x, self.layout.batch, self.heads, *dims)

    def mask(self) -> str:
        """[n, tiles, tile_blocks, 1, window]: 0 where a query block attends a key, else very low.

        n is 1 where all heads have one half window.
        """
        body, block, half_windows = self.body, self.layout.block, self.half_windows
        narrowest = body.ReduceMin(body.Concat(half_windows, body.ints(2**62), axis=0), keepdims=1)
        widest = body.ReduceMax(body.Concat(half_windows, body.ints(-1), axis=0), keepdims=1)
        rows = body.Where(body.Equal(narrowest, widest), body.ints(1), self.heads)
        half_windows = body.Slice(half_windows, body.ints(0), rows)

        queries = body.span(body.Mul(self.tiles, self.tile_blocks))
        queries = body.reshape(queries, self.tiles, self.tile_blocks, 1, 1)
        first_tokens = body.Unsqueeze(body.Mul(self.key_blocks, block), body.ints(2))
        tokens = body.Add(first_tokens, body.span(block))
        tokens = body.reshape(tokens, self.tiles, 1, 1, self.window)
        distance = body.Abs(body.Sub(queries, body.Div(tokens, block)))
        near = body.LessOrEqual(distance, body.reshape(half_windows, rows, 1, 1, 1, 1))
        seen = body.And(near, body.Less(tokens, self.layout.image))
        return body.Where(seen, body.floating(0.0), body.floating(_MASKED))
