"""One graph at a time: a backend against PyTorch on the same inputs and caches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plans.bundle import GraphSpec
from plans.plan import Plan
from plans.processors import BucketHeads, install
from trt_runtime.bundles import load_torch_transformer, open_bundle, open_engine
from trt_runtime.engine import CACHE_IN, DTYPES, allocate, shape_of
from trt_runtime.torch_engine import TorchEngine, position_ids

Progress = Callable[[str, int, int], None]  # what, done, total

# Largest absolute difference allowed: over the final latents as it is, in one bucket per unit of
# the largest reference value (if that is above 1). Rounding, accumulated over tens of layers.
TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 4e-1}


@dataclass(frozen=True)
class GraphParity:
    """How far one graph is from PyTorch at one number of rows.

    bucket None is the dense graph, tensor the worst one.
    """

    bucket: int | None
    rows: int
    tensor: str
    max_abs: float
    reference_max: float
    passed: bool


def random_feeds(
    plan: Plan, graph: GraphSpec, batch: int, *, seed: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """Make inputs of the right shapes, with a timestep at which this graph is used."""
    generator = torch.Generator().manual_seed(seed)
    step = 0 if graph.bucket is None else plan.schedule.index(graph.bucket)
    timestep = plan.sampler.sigmas[step]
    if plan.model.architecture == "SD3Transformer2DModel":
        timestep *= 1000
    feeds = {}
    for spec in graph.inputs:
        tensor = torch.randn(shape_of(spec, batch), generator=generator)
        if spec.name == "timestep":
            tensor.fill_(timestep)
        if spec.name == "guidance":
            tensor.fill_(plan.sampler.guidance_scale)
        feeds[spec.name] = tensor.to(device, DTYPES[spec.dtype])
    return feeds


def compare_graphs(
    folder: Path | str,
    *,
    backend: str = "onnxruntime",
    transformer: nn.Module | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    **session: Any,
) -> list[GraphParity]:
    """Run each graph on the backend and in PyTorch on the same random inputs and caches.

    A bundle with a range of rows is compared at the least and at the most of them.
    session: threads and weights, as SessionSettings has them.
    """
    bundle, plan = open_bundle(folder)
    module = transformer if transformer is not None else load_torch_transformer(bundle, folder)
    graphs = bundle.all_graphs
    results = []
    for done, graph in enumerate(graphs):
        if progress is not None:
            progress(f"comparing {graph.file}", done, len(graphs))
        engine = open_engine(folder, bundle, graph, backend=backend, device=device, **session)
        with engine, TorchEngine(module, plan, graph) as reference:
            for rows in sorted({bundle.rows[0], bundle.rows[-1]}):
                feeds = random_feeds(plan, graph, rows, device=device)
                expected, got = (allocate(graph.outputs, rows, device) for _ in range(2))
                reference.run(feeds, expected)
                engine.run(feeds, got)
                results.append(_parity(graph.bucket, expected, got, TOLERANCE[bundle.dtype]))
    if progress is not None:
        progress("compared", len(graphs), len(graphs))
    return results


def _parity(
    bucket: int | None, expected: dict[str, Tensor], got: dict[str, Tensor], tolerance: float
) -> GraphParity:
    def row(name: str) -> GraphParity:
        reference = expected[name].float()
        difference = max_abs_difference(got[name], reference)
        largest = float(reference.abs().max())
        # Not `>`: a NaN compares false, and must fail.
        passed = difference <= tolerance * max(1.0, largest)
        return GraphParity(bucket, len(reference), name, difference, largest, passed)

    rows = [row(name) for name in expected]
    return max(rows, key=lambda r: (not r.passed, r.max_abs / max(1.0, r.reference_max)))


def max_abs_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where either holds a NaN."""
    difference = float((a.float() - b.float()).abs().max())
    return math.inf if math.isnan(difference) else difference


class _Recorder:
    """A strategy that keeps every module's merged heads as it hands them on."""

    def __init__(self, heads: BucketHeads) -> None:
        self.heads = heads
        self.merged: dict[str, Tensor] = {}

    def computed_heads(self, module: Any) -> tuple[int, ...]:
        return self.heads.computed_heads(module)

    def attend(self, module: Any, q: Any, k: Any, v: Any) -> Tensor:
        merged = self.heads.attend(module, q, k, v)
        self.merged[module.name] = merged
        return merged


def first_departure(
    folder: Path | str,
    bucket: int,
    run_graph: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    *,
    rows: int | None = None,
    transformer: nn.Module | None = None,
) -> tuple[str, float] | None:
    """Name the first attention module, in order of execution, whose output departs, and by how far.

    run_graph: feeds of the bucket's graph -> merged heads [B, S, H, D] by module name. rows: of the
    call, by default the most that the bundle takes.
    """
    bundle, plan = open_bundle(folder)
    module = transformer if transformer is not None else load_torch_transformer(bundle, folder)
    feeds = random_feeds(plan, bundle.graph(bucket), rows or bundle.batch)
    recorded = _record(module, plan, bucket, feeds)
    got = run_graph(feeds)
    for attention in plan.modules:
        if attention.name not in got:
            continue
        reference = recorded[attention.name].float()
        difference = max_abs_difference(got[attention.name], reference)
        largest = max(1.0, float(reference.abs().max()))
        if not difference <= TOLERANCE[bundle.dtype] * largest:
            return attention.name, difference
    return None


@torch.inference_mode()
def _record(
    transformer: nn.Module, plan: Plan, bucket: int, feeds: dict[str, Tensor]
) -> dict[str, Tensor]:
    recorder = _Recorder(BucketHeads(plan, bucket))
    recorder.heads.cache_in = {
        name.removeprefix(CACHE_IN): tensor
        for name, tensor in feeds.items()
        if name.startswith(CACHE_IN)
    }
    arguments = {n: t for n, t in feeds.items() if not n.startswith(CACHE_IN)}
    undo = install(transformer, plan.modules, recorder)
    try:
        transformer(**arguments, **position_ids(plan), return_dict=False)
    finally:
        undo()
    return recorder.merged
