"""Turn a bundle's graphs into engines of a backend, and run each once to know that it works."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from plans.bundle import Bundle, EngineSpec, GraphSpec, save_bundle
from plans.plan import Plan
from trt_runtime.bundles import open_bundle, open_engine
from trt_runtime.doctor import versions
from trt_runtime.engine import allocate
from trt_runtime.parity import Progress, random_feeds


def build(
    folder: Path | str,
    *,
    backend: str = "onnxruntime",
    device: str = "cpu",
    progress: Progress | None = None,
    **session: Any,
) -> Bundle:
    """Build every graph, run it once on random inputs, and record that in bundle.json.

    session: threads and weights, as SessionSettings has them.
    """
    folder = Path(folder)
    bundle, plan = open_bundle(folder)
    graphs = bundle.all_graphs
    built = []
    for done, graph in enumerate(graphs):
        if progress is not None:
            progress(f"building {graph.file}", done, len(graphs))
        built.append(_build_one(folder, bundle, plan, graph, backend, device, session))
    if progress is not None:
        progress("built", len(graphs), len(graphs))
    others = tuple(engine for engine in bundle.engines if engine.backend != backend)
    bundle = replace(bundle, engines=(*others, *built))
    save_bundle(bundle, folder)
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
        feeds = random_feeds(plan, graph, bundle.batch, device=device)
        engine.run(feeds, allocate(graph.outputs, bundle.batch, device))
    seconds = round(time.perf_counter() - started, 3)
    return EngineSpec(backend, graph.bucket, None, True, seconds, versions())
