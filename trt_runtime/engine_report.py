"""What engines take, before they are built as an estimate and afterwards as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plans.bundle import ITEM_BYTES, GraphSpec
from plans.plan import Plan
from plans.tiles import CACHED, FULL
from trt_runtime.bundles import open_bundle
from trt_runtime.engine import CACHE_OUT
from trt_runtime.inspection import inspect_bundle, tensor_bytes

HEADER = (
    "graph", "steps", "layers with full", "arrow", "cached", "engine", "weights", "activations",
    "caches", "ran", "seconds",
)  # fmt: skip

# Widths of the hidden state that live at once at a block's widest place. What TensorRT-RTX 1.7
# planned at 2K, plugins in use: 20 for FLUX, whose single blocks run attention and MLP side by
# side, and 13 for SD3.
_LIVE_WIDTHS = 20

# Measured: Python with PyTorch and TensorRT, and the builder's own for each attention module.
_BUILDER, _BUILDER_PER_MODULE = 480 * 2**20, 28 * 2**20


def estimate(folder: Path | str, weights: str) -> dict[str, int]:
    """Bytes of device memory that a bundle's engines will need for one run, and of file.

    weights: shared (one copy), or embedded or stripped (a copy in every bucket's engine). Exact but
    for the activations, which TensorRT plans while it builds: they are of a plain transformer
    block, with the plugins, and of what a bucket writes to caches, which TensorRT-RTX holds a
    second time until its end; inlined function bodies hold S x S scores too.
    """
    report = inspect_bundle(folder)
    bundle, plan = open_bundle(folder)
    buckets = [graph for graph in report["graphs"] if graph["bucket"] is not None]
    copies = report["weights_shared" if weights == "shared" else "weights_embedded"]
    tokens = max(module.layout.seq_len for module in plan.modules)
    hidden = max(module.heads * module.head_dim for module in plan.modules)
    block = bundle.batch * ITEM_BYTES[bundle.dtype] * tokens * hidden * _LIVE_WIDTHS
    needed = {
        "weights": copies,
        "caches": report["cache_bytes"],
        "inputs and outputs": max(graph["io"] for graph in buckets),
        "activations (about)": block + max(_written(g, bundle.batch) for g in bundle.graphs),
    }
    return {**needed, "together": sum(needed.values())}


def _written(graph: GraphSpec, batch: int) -> int:
    caches = (spec for spec in graph.outputs if spec.name.startswith(CACHE_OUT))
    return sum(tensor_bytes(spec, batch) for spec in caches)


def builder_memory(folder: Path | str, weights: str) -> int:
    """Bytes of host memory that building the largest engine takes, about.

    Weights that an engine embeds are held by the parser, the builder and the serialised engine at
    once: 3.3 times their bytes were measured with FLUX's.
    """
    _, plan = open_bundle(folder)
    largest = max(graph["weights"] for graph in inspect_bundle(folder)["graphs"])
    embedded = 0 if weights == "shared" else int(3.3 * largest)
    return _BUILDER + len(plan.modules) * _BUILDER_PER_MODULE + embedded


def engine_rows(folder: Path | str, backend: str) -> list[dict[str, Any]]:
    """One row per engine of a backend, with HEADER's keys; sizes in bytes, None if not known."""
    _, plan = open_bundle(folder)
    report = inspect_bundle(folder)
    graphs = {graph["bucket"]: graph for graph in report["graphs"]}
    rows = []
    for engine in report["engines"]:
        if engine["backend"] != backend:
            continue
        graph = graphs[engine["bucket"]]
        layers = layer_counts(plan, engine["bucket"])
        rows.append(
            {
                "graph": graph["file"],
                "steps": graph["steps"],
                "layers with full": layers and layers["full"],
                "arrow": layers and layers["arrow"],
                "cached": layers and layers["cached"],
                "engine": engine["bytes"],
                "weights": graph["weights"],
                "activations": engine["activations"],
                "caches": graph["cache_in"] + graph["cache_out"],
                "ran": engine["verified"],
                "seconds": engine["seconds"],
            }
        )
    return rows


def layer_counts(plan: Plan, bucket: int | None) -> dict[str, int] | None:
    """Count the attention modules that have heads of a mode; one may count in all three."""
    if bucket is None:
        return None
    rows = plan.buckets[bucket].modes.values()
    return {
        "full": sum(FULL in row for row in rows),
        "arrow": sum(any(mode >= 0 for mode in row) for row in rows),
        "cached": sum(CACHED in row for row in rows),
    }
