"""Convolutions of patches as products, Einsum as a transpose; what else there is, left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from exporter.patches import simplify

SHAPE = (3, 4, 6, 8)


def graph_of(operator: str, weights: list[torch.Tensor], attributes: dict[str, Any]) -> ir.Model:
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["B", *SHAPE[1:]]), type=kind)
    inits = [
        ir.Value(
            name=f"w{i}",
            shape=ir.Shape(tuple(weight.shape)),
            type=kind,
            const_value=ir.tensor_adapters.TorchTensor(weight, name=f"w{i}"),
        )
        for i, weight in enumerate(weights)
    ]
    node = ir.node(operator, [x, *inits], attributes)
    node.outputs[0].name, node.outputs[0].type = "y", kind
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=inits, opset_imports={"": 20}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("patch", [(2, 2), (3, 2), (1, 1)])
def test_a_convolution_of_patches_is_a_product(patch: tuple[int, int], bias: bool) -> None:
    weights = [torch.randn(5, 4, *patch), torch.randn(5)][: 2 if bias else 1]
    model = graph_of("Conv", weights, {"strides": list(patch), "kernel_shape": list(patch)})
    x = torch.randn(SHAPE).numpy()
    expected = run(model, x)
    simplify(model.graph)
    assert "Conv" not in operators(model) and "Gemm" in operators(model)
    assert [out.name for out in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(run(model, x), expected, atol=1e-5)
    matrix = next(v for n, v in model.graph.initializers.items() if n.endswith(".matrix"))
    assert matrix.const_value is not None and isinstance(matrix.const_value.raw, torch.Tensor)
    assert matrix.const_value.raw.data_ptr() == weights[0].data_ptr()


@pytest.mark.parametrize(
    ("weight", "attributes"),
    [
        ((5, 4, 2, 2), {"strides": [1, 1]}),
        ((5, 4, 2, 2), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((5, 4, 2, 2), {"strides": [2, 2], "dilations": [2, 2]}),
        ((4, 2, 2, 2), {"strides": [2, 2], "group": 2}),
        ((5, 4, 4, 4), {"strides": [4, 4]}),  # six rows are no multiple of four
    ],
)
def test_other_convolutions_are_left(weight: tuple[int, ...], attributes: dict[str, Any]) -> None:
    model = graph_of("Conv", [torch.randn(weight)], attributes)
    simplify(model.graph)
    assert operators(model) == ["Conv"]


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "FLOAT"])
def test_silu_of_16_bits_is_computed_in_fp32(dtype: str, gate_first: bool) -> None:
    kind = ir.TensorType(ir.DataType[dtype])
    x = ir.Value(name="x", shape=ir.Shape(["B", 256]), type=kind)
    sigmoid = ir.node("Sigmoid", [x])
    pair = [*sigmoid.outputs, x]
    product = ir.node("Mul", pair if gate_first else pair[::-1])
    product.outputs[0].name, product.outputs[0].type = "y", kind
    graph = ir.Graph(
        [x], product.outputs, nodes=[sigmoid, product], opset_imports={"": 20}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    simplify(graph)
    if dtype == "FLOAT":
        assert operators(model) == ["Sigmoid", "Mul"]
        return
    # What is left of the 16-bit Sigmoid has no use; `tidy` removes it.
    assert operators(model) == ["Sigmoid", "Cast", "Sigmoid", "Mul", "Cast"]
    assert graph.outputs[0].name == "y" and graph.outputs[0].dtype == kind.dtype
    if dtype == "FLOAT16":
        values = torch.linspace(-12, 12, 4 * 256).reshape(4, 256).half()
        expected = torch.nn.functional.silu(values.float()).half()
        np.testing.assert_allclose(run(model, values.numpy()), expected, rtol=2**-10, atol=2e-6)


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("nhwc -> nchw", ["Transpose"]),
        ("abcd->dcba", ["Transpose"]),
        ("abcd->abc", ["Einsum"]),
        ("a...->...a", ["Einsum"]),
    ],
)
def test_einsum_that_permutes_is_a_transpose(equation: str, expected: list[str]) -> None:
    model = graph_of("Einsum", [], {"equation": equation})
    x = torch.randn(SHAPE).numpy()
    want = run(model, x)
    simplify(model.graph)
    assert operators(model) == expected
    np.testing.assert_array_equal(run(model, x), want)
