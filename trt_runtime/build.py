"""Turn a bundle's graphs into engines of a backend, and run each once to know that it works."""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from plans.bundle import Bundle, EngineSpec, GraphSpec, save_bundle
from plans.errors import ArrowheadError
from plans.plan import Plan
from trt_runtime.bundles import open_bundle, open_engine
from trt_runtime.doctor import versions
from trt_runtime.engine import Engine, allocate
from trt_runtime.parity import Progress, random_feeds
from trt_runtime.tensorrt_build import BuildSettings, build_engine
from trt_runtime.tensorrt_engine import TensorRTEngine, on_device
from trt_runtime.tensorrt_metadata import EngineMetadata, engine_path, save_metadata


def build(
    folder: Path | str,
    *,
    backend: str = "onnxruntime",
    device: str = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> Bundle:
    """Build every graph, run it once on random inputs, and record that in bundle.json.

    options: threads and weights, as SessionSettings has them; for backend "tensorrt" the fields of
    BuildSettings. TensorRT's engines are recorded one by one, so that a build that was stopped
    keeps what it had; where they cannot run they are marked as never run.
    """
    folder = Path(folder)
    bundle, plan = open_bundle(folder)
    graphs = bundle.all_graphs
    for done, graph in enumerate(graphs):
        if progress is not None:
            progress(f"building {graph.file}", done, len(graphs))
        if backend == "tensorrt":
            settings = BuildSettings(**options)
            built = _build_tensorrt(folder, bundle, plan, graph, device, settings, progress)
        else:
            built = _build_one(folder, bundle, plan, graph, backend, device, options)
        others = [e for e in bundle.engines if (e.backend, e.bucket) != (backend, graph.bucket)]
        bundle = replace(bundle, engines=(*others, built))
        save_bundle(bundle, folder)
    if progress is not None:
        progress("built", len(graphs), len(graphs))
    return bundle


def _build_one(
    folder: Path,
    bundle: Bundle,
    plan: Plan,
    graph: GraphSpec,
    backend: str,
    device: str,
    session: dict[str, Any],
) -> EngineSpec:
    started = time.perf_counter()
    engine = open_engine(folder, bundle, graph, backend=backend, device=device, **session)
    with engine:
        _run_once(engine, bundle, plan, graph, device)
    seconds = round(time.perf_counter() - started, 3)
    return EngineSpec(backend, graph.bucket, None, True, seconds, versions())


def _run_once(engine: Engine, bundle: Bundle, plan: Plan, graph: GraphSpec, device: str) -> None:
    """Run on random inputs; with a range of rows, of its least and of its most."""
    for rows in sorted({bundle.rows[0], bundle.rows[-1]}):
        feeds = random_feeds(plan, graph, rows, device=device)
        engine.run(feeds, allocate(graph.outputs, rows, device))


def _build_tensorrt(
    folder: Path,
    bundle: Bundle,
    plan: Plan,
    graph: GraphSpec,
    device: str,
    settings: BuildSettings,
    progress: Progress | None,
) -> EngineSpec:
    gpu = torch.cuda.is_available()
    with on_device(torch.device(device)) if gpu else nullcontext():
        metadata = build_engine(folder, bundle, plan, graph, settings, progress)
    if gpu:
        metadata = _try(folder, bundle, plan, graph, device, metadata)
    tensorrt = metadata.tensorrt
    return EngineSpec(
        "tensorrt",
        graph.bucket,
        engine_path(folder, graph).relative_to(folder).as_posix(),
        metadata.verified,
        metadata.seconds,
        versions() | {tensorrt["flavour"]: tensorrt["version"]},
    )


def _try(
    folder: Path,
    bundle: Bundle,
    plan: Plan,
    graph: GraphSpec,
    device: str,
    metadata: EngineMetadata,
) -> EngineMetadata:
    """Run an engine once; give its metadata with what that showed."""
    engine = open_engine(folder, bundle, graph, backend="tensorrt", device=device)
    assert isinstance(engine, TensorRTEngine)
    try:
        with engine:
            _run_once(engine, bundle, plan, graph, device)
            torch.cuda.synchronize(device)
            metadata = replace(metadata, verified=True, activation_bytes=engine.activation_bytes)
    except ArrowheadError as error:
        # TensorRT-RTX builds for GPUs it does not run on itself, an H200 among them.
        warnings.warn(f"built, but does not run here: {error}", stacklevel=4)
        return metadata
    save_metadata(metadata, engine.path)
    return metadata
