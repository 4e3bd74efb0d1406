from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from exporter.functions import DOMAIN, OPSET, VERSION, function_protos
from plans import reference

ELEMENTS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}


def one_op_model(
    tensors: dict[str, Tensor], attributes: dict[str, Any], symbolic: bool, name: str = ""
) -> onnx.ModelProto:
    """A graph of one operator: `name`, or the attention that these tensors are for."""

    def info(name: str, tensor: Tensor) -> onnx.ValueInfoProto:
        shape = list(tensor.shape)
        if symbolic and tensor.dim() == 4:
            shape[:2] = ["B", "S"]
        return helper.make_tensor_value_info(name, ELEMENTS[tensor.dtype], shape)

    name = name or ("CachedHead" if "cache" in tensors else "ArrowAttention")
    node = helper.make_node(name, list(tensors), ["o"], domain=DOMAIN, **attributes)
    dtype = ELEMENTS[next(iter(tensors.values())).dtype]
    graph = helper.make_graph(
        [node],
        "one_op",
        [info(name, tensor) for name, tensor in tensors.items()],
        [helper.make_tensor_value_info("o", dtype, [None] * 4)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(
        graph, functions=function_protos(), opset_imports=opsets, ir_version=10
    )


def session(model: onnx.ModelProto, save: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = save
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(tensors: dict[str, Tensor], attributes: dict[str, Any], symbolic: bool = False) -> Tensor:
    model = one_op_model(tensors, attributes, symbolic)
    feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
    return torch.from_numpy(session(model).run(None, feeds)[0])


@st.composite
def cases(draw: Any) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    batch, image = draw(st.integers(1, 2)), draw(st.integers(1, 50))
    text = draw(st.one_of(st.just(0), st.integers(0, 9)))
    windows = draw(st.lists(st.sampled_from([-1, -1, 0, 1, 2, 3, 5, 9]), min_size=1, max_size=6))
    attributes = {
        "scale": 0.4,
        "text_tokens": text,
        "text_first": draw(st.integers(0, 1)),
        "block": draw(st.sampled_from([1, 2, 3, 5, 8, 16, 128])),
        "half_windows": windows,
    }
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16]))
    torch.manual_seed(draw(st.integers(0, 99)))
    shape = (batch, image + text, len(windows), draw(st.sampled_from([4, 8])))
    tensors = {name: (2 * torch.randn(shape)).to(dtype) for name in "qkv"}
    cached = draw(st.integers(0, 3))
    if cached:
        tensors["cache"] = torch.randn(*shape[:2], cached, shape[3]).to(dtype)
        heads = st.integers(0, len(windows) + cached - 1)
        attributes["source"] = draw(st.lists(heads, min_size=1, max_size=6))
    return tensors, attributes, draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(cases())
def test_bodies_equal_the_reference(case: tuple[dict[str, Tensor], dict[str, Any], bool]) -> None:
    tensors, attributes, symbolic = case
    named = {**attributes, "text_first": bool(attributes["text_first"])}
    function = reference.cached_head if "cache" in tensors else reference.arrow_attention
    want = function(**tensors, **named)
    got = run(tensors, attributes, symbolic)
    assert got.shape == want.shape and got.dtype == want.dtype
    # Logits reach 30 and values 6: one fp32 rounding of the one, times the other.
    tolerance = 30 * 6 * 2**-23 if got.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_large_scores_do_not_overflow() -> None:
    """Logits of some hundreds, as real models have: the mask must still be below them."""
    q = torch.full((1, 12, 2, 4), 30.0)
    tensors = {"q": q, "k": -q, "v": torch.randn(1, 12, 2, 4)}
    attributes = dict(scale=0.5, text_tokens=2, text_first=0, block=2, half_windows=[0, 1])
    want = reference.arrow_attention(**tensors, **{**attributes, "text_first": False})
    torch.testing.assert_close(run(tensors, attributes), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("windows", [[-1, -1], [0, 2], [-1, 1]])
def test_what_depends_on_attributes_alone_is_folded(windows: list[int], tmp_path: Any) -> None:
    """At run time only data moves: no comparison, sorting or mask is computed."""
    tensors = {name: torch.randn(2, 70, 2, 8) for name in "qkv"}
    attributes = dict(scale=0.5, text_tokens=6, text_first=1, block=4, half_windows=windows)
    path = tmp_path / "optimised.onnx"
    session(one_op_model(tensors, attributes, symbolic=False), save=str(path))
    left = {node.op_type for node in onnx.load(path).graph.node}
    moves = {"Transpose", "Gather", "Slice", "Split", "Concat", "Reshape", "Pad"}
    assert left <= moves | {"MatMul", "FusedMatMul", "Softmax", "Add", "Mul"}


def test_the_mask_stays_small(tmp_path: Any) -> None:
    """The window is masked by block: far from S x S, which 2K pictures could not hold."""
    tensors = {name: torch.randn(1, 1030, 2, 4) for name in "qkv"}
    attributes = dict(scale=0.5, text_tokens=6, text_first=0, block=16, half_windows=[2, 4])
    path = tmp_path / "optimised.onnx"
    session(one_op_model(tensors, attributes, symbolic=False), save=str(path))
    constants = sum(np.prod(x.dims) for x in onnx.load(path).graph.initializer)
    assert constants < 30_000


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_equal_pytorch(dtype: torch.dtype, symbolic: bool) -> None:
    x, weight = (3 * torch.randn(2, 7, 3, 8)).to(dtype), torch.randn(8).to(dtype)
    angles = torch.randn(7, 8)
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    for name, others, attributes, want in (
        ("HeadNorm", {"weight": weight}, {"epsilon": 0.1},
         F.rms_norm(x, (8,), weight, 0.1)),
        ("HeadRotary", tables, {},
         apply_rotary_emb(x, tuple(tables.values()), sequence_dim=1)),
    ):  # fmt: skip
        model = one_op_model({"x": x, **others}, attributes, symbolic, name)
        feeds = {name: tensor.numpy() for name, tensor in {"x": x, **others}.items()}
        got = torch.from_numpy(session(model).run(None, feeds)[0])
        assert got.dtype == dtype
        torch.testing.assert_close(
            got, want, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-6
        )
