"""Graph rewrites after tracing. None makes a changed copy of a weight."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer

from exporter.functions import ATTENTION, DOMAIN, function_protos
from exporter.patches import simplify
from plans.bundle import BATCH

# Weights and tables are torch tensors in the traced graph; folded constants are not.
_TRACED = "torch.Tensor"


def weight_of(value: ir.Value | None) -> torch.Tensor | None:
    """The torch tensor of an initializer that came from the model, else None."""
    raw = getattr(value.const_value, "raw", None) if value is not None else None
    return raw if isinstance(raw, torch.Tensor) else None


def tidy(model: ir.Model) -> None:
    """Fold constants, name what the runtime needs, and drop traces of where the export ran."""
    passes.InlinePass()(model)
    optimizer.fold_constants_ir(
        model,
        # A folded Transpose or Slice of a weight would be a second copy of its bytes.
        should_fold=lambda node: False if any(map(_is_weight, node.inputs)) else None,
    )
    simplify(model.graph)
    _fix_reshapes(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    _fold_row_slices(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        del model.graph.initializers[name]
    _copy_whole_caches(model.graph)
    _name_attention(model.graph)
    _name_batch(model.graph)
    _forget_origin(model)


def add_functions(model: ir.Model) -> None:
    """Let the model carry the operators' bodies, used or not."""
    for proto in function_protos():
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function


def _is_weight(value: ir.Value | None) -> bool:
    return weight_of(value) is not None


def _fold_row_slices(graph: ir.Graph) -> None:
    """Make each Slice of a weight's rows an initializer that shares the weight's memory."""
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Slice" and not node.domain else None
        weight = weight_of(source)
        rows = _row_range(node)
        if source is None or source.dtype is None or weight is None or rows is None:
            continue
        first, last = rows[0], min(rows[1], weight.shape[0])
        tensor = weight.detach()[first:last]
        name = f"{source.name}.rows_{first}_{last}"
        if name not in graph.initializers:
            graph.register_initializer(
                ir.Value(
                    name=name,
                    shape=ir.Shape(tensor.shape),
                    type=ir.TensorType(source.dtype),
                    const_value=ir.tensor_adapters.TorchTensor(tensor, name=name),
                )
            )
        ir.convenience.replace_all_uses_with(node.outputs[0], graph.initializers[name])
        graph.remove(node, safe=True)


def _fix_reshapes(graph: ir.Graph) -> None:
    """Let Reshape work a dynamic batch out, where tracing has computed it at run time."""
    for node in graph:
        shape = node.outputs[0].shape
        if node.op_type != "Reshape" or node.domain or shape is None:
            continue
        given = node.inputs[1]
        if given is None or ir.convenience.get_const_tensor(given) is not None:
            continue
        dims = [dim if isinstance(dim, int) else -1 for dim in shape]
        if dims.count(-1) != 1 or 0 in dims:  # several unknown, or -1 beside nothing
            continue
        name = "shape_" + "_".join(map(str, dims)).replace("-1", "batch")
        if name not in graph.initializers:
            graph.register_initializer(
                ir.Value(
                    name=name,
                    shape=ir.Shape((len(dims),)),
                    type=ir.TensorType(ir.DataType.INT64),
                    const_value=ir.tensor(dims, ir.DataType.INT64, name=name),
                )
            )
        node.replace_input_with(1, graph.initializers[name])


def _row_range(node: ir.Node) -> tuple[int, int] | None:
    """Bounds of a Slice along axis 0 with constant bounds and no step, else None."""
    bounds = []
    for value in node.inputs[1:]:
        constant = None if value is None else ir.convenience.get_const_tensor(value)
        if constant is None or constant.size != 1:
            return None
        bounds.append(int(constant.numpy().reshape(())))
    if len(bounds) < 3 or min(bounds[:2]) < 0 or bounds[2:] not in ([0], [0, 1]):
        return None
    return bounds[0], bounds[1]


def _copy_whole_caches(graph: ir.Graph) -> None:
    """Let a cache of all heads of a module be a copy of the operator's output, as others are."""
    for place, value in enumerate(list(graph.outputs)):
        operator = value.producer()
        if operator is None or operator.op_type not in ATTENTION:
            continue
        copy = ir.node("Identity", [value])
        copy.outputs[0].name, value.name = value.name, None
        copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
        graph.insert_after(operator, copy)
        graph.outputs[place] = copy.outputs[0]


def _name_attention(graph: ir.Graph) -> None:
    """Name each attention after its module, and its output `merged.<module>`."""
    for node in graph:
        if node.domain != DOMAIN or node.op_type not in ATTENTION:
            continue
        # TensorRT's parser looks here for a plugin; where it finds none by this name it takes the
        # function body, and by the domain alone it would take the body always.
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        paths = [x.strip(" '\"") for x in scopes.strip("[]").split(",")]
        modules = [x.removeprefix("transformer.") for x in paths if ".attn" in x]
        if modules:
            node.name = modules[0]
            node.outputs[0].name = f"merged.{modules[0]}"


def _name_batch(graph: ir.Graph) -> None:
    """Name a dynamic first dimension of the inputs as bundle.json does, wherever it comes."""
    symbols = {dim for x in graph.inputs if x.shape for dim in x.shape if not isinstance(dim, int)}
    values = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *values):
        shape = value.shape or ir.Shape(())
        for axis, dim in enumerate(shape):
            if dim in symbols:
                shape[axis] = BATCH


def _forget_origin(model: ir.Model) -> None:
    # Tracing notes stack traces, with the paths of the machine, on every node and value.
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
