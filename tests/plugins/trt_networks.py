"""Parse graphs, and build engines of them, with TensorRT and the plugin library; for a process of
its own: python -m tests.plugins.trt_networks LIBRARY GRAPH.onnx...

Prints a JSON list with an entry a graph.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tensorrt as trt

LARGEST_BATCH = 4  # of a graph whose batch is open


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps warnings and errors."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.WARNING, trt.ILogger.INTERNAL_ERROR):
            self.lines.append(message)


def build(builder: Any, network: Any) -> bytes:
    """Build an engine, which needs no GPU with TensorRT-RTX; nothing if TensorRT refuses."""
    config = builder.create_builder_config()
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if any(x.shape[0] < 0 for x in inputs):
        profile = builder.create_optimization_profile()
        for x in inputs:
            shapes = [(batch, *x.shape[1:]) for batch in (1, 2, LARGEST_BATCH)]
            profile.set_shape(x.name, *shapes)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return b"" if plan is None else bytes(plan)


def examine(path: str, builder: Any, log: Log) -> dict[str, Any]:
    """Parse one graph; build it if it parses."""
    log.lines.clear()
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    found: dict[str, Any] = {"parsed": parser.parse_from_file(path)}
    if found["parsed"]:
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        found["layers"] = [str(layer.type).removeprefix("LayerType.") for layer in layers]
        output = network.get_output(0)
        found["output"] = [list(output.shape), str(output.dtype).removeprefix("DataType.")]
        engine = build(builder, network)
        found["engine_bytes"] = len(engine)
        found["fields"] = [name for name in ("half_windows", "source") if name.encode() in engine]
    found["log"] = "\n".join(log.lines)
    return found


def main() -> None:
    library, *graphs = sys.argv[1:]
    log = Log()
    builder = trt.Builder(log)
    if trt.get_plugin_registry().load_library(library) is None:
        sys.exit("\n".join(log.lines))
    print(json.dumps([examine(path, builder, log) for path in graphs]))


if __name__ == "__main__":
    main()
