"""The patch embedding as the product it is, transposes in place of Einsum, SiLU in fp32.

bf16 has neither Conv nor Einsum in the graphs' opset, so that no bf16 graph with them loads; and
without a convolution ONNX Runtime's CUDA provider needs no cuDNN.

PyTorch computes x * sigmoid(x) in fp32 and rounds once. ONNX Runtime's CUDA provider rounds within
its Sigmoid, and takes 1 - sigmoid(-x) of negative x, of which 16 bits leave little. In bf16 the
embedding of the timestep, which modulates every token, then costs as much as all other rounding.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch


def simplify(graph: ir.Graph) -> None:
    """Rewrite convolutions of patches, every Einsum that only permutes axes, and 16-bit SiLU."""
    for node in list(graph):
        if node.op_type == "Einsum" and not node.domain:
            _permutation(graph, node)
        elif node.op_type == "Conv" and not node.domain:
            _patches(graph, node)
        elif node.op_type == "Mul" and not node.domain:
            _silu(graph, node)


def _permutation(graph: ir.Graph, node: ir.Node) -> None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    before, _, after = equation.partition("->")
    if "." in equation or len(set(before)) < len(before) or set(before) != set(after):
        return
    order = [before.index(axis) for axis in after]
    _replace(graph, node, [ir.node("Transpose", node.inputs, {"perm": order})])


def _patches(graph: ir.Graph, node: ir.Node) -> None:
    """Conv of [B, C, H, W] whose kernel is as wide as its stride: a product for every patch."""
    picture, kernel, *bias = node.inputs
    if picture is None or picture.shape is None or kernel is None or kernel.const_value is None:
        return
    weight = kernel.const_value.raw
    if not isinstance(weight, torch.Tensor) or weight.dim() != 4:
        return
    out_channels, channels, *size = weight.shape
    given = {name: list(value.as_ints()) for name, value in node.attributes.items()
             if name in ("pads", "strides", "dilations")}  # fmt: skip
    _, taken, *sides = picture.shape
    whole = [side for side, patch in zip(sides, size, strict=True)
             if isinstance(side, int) and side % patch == 0]  # fmt: skip
    if (
        given.get("strides") != size
        or any(given.get("pads", ()))
        or any(dilation != 1 for dilation in given.get("dilations", ()))
        or taken != channels  # with groups a kernel has fewer
        or len(whole) != 2
    ):
        return
    rows, columns = whole[0] // size[0], whole[1] // size[1]
    nodes: list[ir.Node] = []

    def then(operator: str, *inputs: ir.Value | None, **attributes: Any) -> None:
        before = nodes[-1].outputs[0] if nodes else picture
        nodes.append(ir.node(operator, [before, *inputs], attributes or None))

    then("Reshape", _shape(graph, [-1, channels, rows, size[0], columns, size[1]]))
    then("Transpose", perm=[0, 2, 4, 1, 3, 5])
    then("Reshape", _shape(graph, [-1, channels * size[0] * size[1]]))
    then("Gemm", _matrix(graph, kernel, weight), *bias, transB=1)
    then("Reshape", _shape(graph, [-1, rows, columns, out_channels]))
    then("Transpose", perm=[0, 3, 1, 2])
    _replace(graph, node, nodes)


def _silu(graph: ir.Graph, node: ir.Node) -> None:
    """x * sigmoid(x) of 16 bits: both in fp32, and rounded once."""
    for x, gate in (node.inputs, reversed(node.inputs)):
        sigmoid = None if gate is None else gate.producer()
        if (
            x is not None
            and x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
            and sigmoid is not None
            and (sigmoid.op_type, sigmoid.domain, *sigmoid.inputs) == ("Sigmoid", "", x)
        ):
            wide = ir.node("Cast", [x], {"to": ir.DataType.FLOAT})
            gated = ir.node("Sigmoid", wide.outputs)
            product = ir.node("Mul", [*wide.outputs, *gated.outputs])
            rounded = ir.node("Cast", product.outputs, {"to": x.dtype})
            for made in (wide, gated, product):
                made.outputs[0].shape = x.shape
                made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            _replace(graph, node, [wide, gated, product, rounded])
            return


def _matrix(graph: ir.Graph, kernel: ir.Value, weight: torch.Tensor) -> ir.Value:
    """The kernel as [out, in], an initializer that shares its memory."""
    name = f"{kernel.name}.matrix"
    matrix = weight.detach().flatten(1)
    return _initializer(
        graph, name, ir.tensor_adapters.TorchTensor(matrix, name=name), kernel.dtype
    )


def _shape(graph: ir.Graph, dims: list[int]) -> ir.Value:
    name = "shape_" + "_".join(map(str, dims)).replace("-1", "batch")
    return _initializer(
        graph, name, ir.tensor(dims, ir.DataType.INT64, name=name), ir.DataType.INT64
    )


def _initializer(
    graph: ir.Graph, name: str, tensor: ir.TensorProtocol, dtype: ir.DataType | None
) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(
            ir.Value(
                name=name,
                shape=ir.Shape(tensor.shape.numpy()),
                type=None if dtype is None else ir.TensorType(dtype),
                const_value=tensor,
            )
        )
    return graph.initializers[name]


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put nodes in the place of one, whose output the last of them has."""
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])
