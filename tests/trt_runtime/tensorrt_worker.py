"""Run in the offline TensorRT environment: say as JSON what the real parser makes of a bundle.

python -m tests.trt_runtime.tensorrt_worker BUNDLE shared|embedded plugins|bodies
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from plans.bundle import GraphSpec
from plans.plan import Plan
from trt_runtime.bundles import open_bundle
from trt_runtime.tensorrt_library import TensorRT, load_plugins, tensorrt
from trt_runtime.tensorrt_network import (
    check_io,
    dtype_name,
    layers,
    operators_found,
    parse_graph,
    share_weights,
)


def describe(trt: TensorRT, folder: Path, plan: Plan, graph: GraphSpec, weights: str) -> Any:
    """One graph as a network: its tensors, plugins with attributes, and constants in bytes."""
    api = trt.api
    builder = api.Builder(trt.logger)
    network, parser = parse_graph(trt, builder, folder / graph.file)
    shared = share_weights(trt, network, graph) if weights == "shared" else ()
    check_io(trt, network, graph, shared)

    def tensor(value: Any) -> list[Any]:
        return [value.name, dtype_name(api, value.dtype), list(value.shape)]

    used = {
        layer.get_input(i).name
        for layer in layers(network)
        for i in range(layer.num_inputs)
        if layer.get_input(i) is not None
    }
    found: dict[str, Any] = {
        "inputs": [tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "operators": operators_found(trt, network, plan, graph),
        "constants": [
            layer.name
            for layer in layers(network)
            if layer.type == api.LayerType.CONSTANT and layer.get_output(0).name in used
        ],
        "plugins": {},
    }
    for layer in layers(network):
        if layer.type == api.LayerType.PLUGIN_V3:
            found["plugins"][layer.name] = _plugin(api, layer, tensor)
    del parser
    return found


def _plugin(api: Any, layer: Any, tensor: Any) -> dict[str, Any]:
    inputs = [tensor(layer.get_input(i))[1:] for i in range(layer.num_inputs)]
    output = tensor(layer.get_output(0))[1:]
    layer.__class__ = api.IPluginV3Layer  # the bindings give the base class
    kinds = api.PluginCapabilityType
    core = layer.plugin.get_capability_interface(kinds.CORE)
    build = layer.plugin.get_capability_interface(kinds.BUILD)
    return {
        "name": core.plugin_name,
        "version": core.plugin_version,
        "namespace": core.plugin_namespace,
        "attributes": json.loads(build.metadata_string),
        "inputs": inputs,
        "output": output,
    }


def main() -> int:
    folder, weights, operators = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    trt = tensorrt()
    bundle, plan = open_bundle(folder)
    plugin = load_plugins() if operators == "plugins" else None
    graphs = {
        graph.file: describe(trt, folder, plan, graph, weights) for graph in bundle.all_graphs
    }
    report = {
        "flavour": trt.flavour,
        "version": trt.version,
        "plugin": plugin.identity if plugin else None,
        "graphs": graphs,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
