"""What a bundle holds and what it will take: bytes of weights, caches and I/O, modes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plans.bundle import ITEM_BYTES, EngineSpec, GraphSpec, TensorSpec, WeightSpec
from plans.errors import ArrowheadError
from plans.plan import Plan
from trt_runtime.bundles import open_bundle
from trt_runtime.engine import CACHE_IN, CACHE_OUT, shape_of
from trt_runtime.plan_text import mode_counts
from trt_runtime.tensorrt_metadata import load_metadata


def inspect_bundle(folder: Path | str) -> dict[str, Any]:
    """Sum up a bundle and its engines; all sizes in bytes, at the most rows it takes.

    weights_shared is one copy for all graphs, weights_embedded a copy in every bucket's engine.
    cache_bytes is for one cache context: FLUX under true CFG has two.
    """
    folder = Path(folder)
    bundle, plan = open_bundle(folder)
    graphs = [_graph(folder, plan, graph, bundle.batch) for graph in bundle.all_graphs]
    buckets = [g for g in graphs if g["bucket"] is not None]
    caches = {
        spec.name: tensor_bytes(spec, bundle.batch)
        for graph in bundle.graphs
        for spec in graph.outputs
        if spec.name.startswith(CACHE_OUT)
    }
    return {
        "folder": str(folder),
        "architecture": bundle.model["architecture"],
        "picture": [plan.height, plan.width],
        "steps": plan.steps,
        "schedule": list(plan.schedule),
        "dtype": bundle.dtype,
        "batch": bundle.batch,
        "batch_range": None if bundle.batch_range is None else bundle.batch_range._asdict(),
        "weights_file": (folder / bundle.weights_file).stat().st_size,
        "weights_shared": _union(w for graph in bundle.graphs for w in graph.weights),
        "weights_embedded": sum(g["weights"] for g in buckets),
        "cache_bytes": sum(caches.values()),
        "cache_groups": len(caches),
        "graphs": graphs,
        "engines": [_engine(folder, engine) for engine in bundle.engines],
        "versions": dict(bundle.versions),
    }


def _graph(folder: Path, plan: Plan, graph: GraphSpec, batch: int) -> dict[str, Any]:
    reads = [spec for spec in graph.inputs if spec.name.startswith(CACHE_IN)]
    writes = [spec for spec in graph.outputs if spec.name.startswith(CACHE_OUT)]
    others = [spec for spec in (*graph.inputs, *graph.outputs) if spec not in (*reads, *writes)]
    return {
        "file": graph.file,
        "bucket": graph.bucket,
        "steps": plan.schedule.count(graph.bucket) if graph.bucket is not None else None,
        "graph_bytes": (folder / graph.file).stat().st_size,
        "weights": _union(graph.weights),
        "cache_in": sum(tensor_bytes(spec, batch) for spec in reads),
        "cache_out": sum(tensor_bytes(spec, batch) for spec in writes),
        "io": sum(tensor_bytes(spec, batch) for spec in others),
        "modes": None if graph.bucket is None else mode_counts(plan, graph.bucket),
    }


def _engine(folder: Path, engine: EngineSpec) -> dict[str, Any]:
    """What is known of an engine; sizes are None where the backend writes no file of its own."""
    try:
        metadata = None if engine.file is None else load_metadata(folder / engine.file)
    except ArrowheadError:  # gone since; opening the engine says so
        metadata = None
    return {
        "backend": engine.backend,
        "bucket": engine.bucket,
        "verified": engine.verified,
        "seconds": engine.seconds,
        "bytes": metadata and metadata.engine_bytes,
        "weights": metadata and metadata.weights,
        "own_weights": metadata and metadata.weights_bytes,
        "activations": metadata and metadata.activation_bytes,
        "plugins": metadata and list(metadata.operators.values()).count("plugin"),
    }


def tensor_bytes(spec: TensorSpec, batch: int) -> int:
    """Bytes of a tensor, with `batch` rows if its batch is dynamic."""
    return math.prod(shape_of(spec, batch)) * ITEM_BYTES[spec.dtype]


def _union(weights: Iterable[WeightSpec]) -> int:
    """Bytes of the file that these cover; row slices of one matrix overlap."""
    covered, end = 0, 0
    for begin, stop in sorted((w.offset, w.offset + w.nbytes) for w in weights):
        covered += max(0, stop - max(begin, end))
        end = max(end, stop)
    return covered
