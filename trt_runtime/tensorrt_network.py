"""A bucket graph as a TensorRT network: parsed, large weights made inputs, operators found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plans.bundle import GraphSpec, WeightSpec
from plans.errors import ArrowheadError
from plans.plan import Plan
from plans.tiles import CACHED
from trt_runtime.tensorrt_library import TensorRT, last_error


def dtype_name(api: Any, dtype: Any) -> str:
    """Name a TensorRT data type as bundle.json does; ones that no bundle has by their own name."""
    kinds = api.DataType
    names = {
        kinds.FLOAT: "float32",
        kinds.HALF: "float16",
        kinds.BF16: "bfloat16",
        kinds.INT64: "int64",
    }
    return names.get(dtype, str(dtype))


def parse_graph(trt: TensorRT, builder: Any, path: Path) -> tuple[Any, Any]:
    """Parse an ONNX file; give the network and the parser, which owns memory of the network's.

    Strongly typed, which is how TensorRT 10 is asked for what 11 does anyway. Raises ArrowheadError
    with the parser's reasons.
    """
    api = trt.api
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, trt.logger)
    if not parser.parse_from_file(str(path)):
        # The log and not the parser's own list: what a plugin says of a node is in the log alone.
        raise ArrowheadError(
            f"graph {path.name}",
            got=last_error(trt),
            expected=f"a graph {trt.flavour} {trt.version} can parse",
            fix="export the bundle again; if it says the same, update TensorRT",
        )
    return network, parser


def layers(network: Any) -> Iterator[Any]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def share_weights(trt: TensorRT, network: Any, graph: GraphSpec) -> tuple[WeightSpec, ...]:
    """Turn the graph's matrices from constants into network inputs of the same names; list them.

    Vectors (biases, norms' scales) stay: they are small, and fused into kernels as constants. So
    do weights that the parser makes no constant layer of, as a convolution's.
    """
    constants = {
        layer.name: layer.get_output(0)
        for layer in layers(network)
        if layer.type == trt.api.LayerType.CONSTANT
    }
    shared = [spec for spec in graph.weights if len(spec.shape) > 1 and spec.name in constants]
    replacements = {}
    for spec in shared:
        constant = constants[spec.name]
        if tuple(constant.shape) != spec.shape or dtype_name(trt.api, constant.dtype) != spec.dtype:
            raise ArrowheadError(
                f"weight {spec.name} of {graph.file}",
                got=f"{constant.dtype} {list(constant.shape)} from TensorRT's parser",
                expected=f"{spec.dtype} {list(spec.shape)}, as bundle.json says",
                fix="build with --weights embedded",
            )
        tensor = network.add_input(spec.name, constant.dtype, constant.shape)
        replacements[constant.name] = tensor
    for layer in layers(network):
        for index in range(layer.num_inputs):
            source = layer.get_input(index)
            if source is not None and source.name in replacements:
                layer.set_input(index, replacements[source.name])
    return tuple(shared)


def operators_found(trt: TensorRT, network: Any, plan: Plan, graph: GraphSpec) -> dict[str, str]:
    """Say for each attention module's operator if the parser took the plugin or the function body.

    Modules that the bucket takes from the cache alone have no operator.
    """
    if graph.bucket is None:
        return {}
    plugins = {layer.name for layer in layers(network) if layer.type == trt.api.LayerType.PLUGIN_V3}
    modes = plan.buckets[graph.bucket].modes
    return {
        module.name: "plugin" if module.name in plugins else "function"
        for module in plan.modules
        if set(modes[module.name]) != {CACHED}
    }


def check_io(
    trt: TensorRT, network: Any, graph: GraphSpec, weights: tuple[WeightSpec, ...]
) -> None:
    """Hold the network's inputs and outputs against bundle.json, names, types and shapes."""
    api = trt.api
    expected = {(t.name, t.dtype, _dims(t.shape)) for t in (*graph.inputs, *graph.outputs)}
    expected |= {(w.name, w.dtype, w.shape) for w in weights}
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    found = {(t.name, dtype_name(api, t.dtype), tuple(t.shape)) for t in tensors}
    if found != expected:
        raise ArrowheadError(
            f"inputs and outputs of {graph.file}",
            got=sorted(found - expected),
            expected=sorted(expected - found),
            fix="export the bundle again; it and bundle.json are not of one export",
        )


def _dims(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(-1 if isinstance(dim, str) else dim for dim in shape)
