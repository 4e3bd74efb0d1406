"""Whole runs and graphs on ONNX Runtime beside PyTorch's backend, on any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter import export_bundle
from tests.testbed import reader
from tests.testbed.models import TESTBED
from tests.trt_runtime.testbed_pictures import error, plan_of
from trt_runtime import attach, detach
from trt_runtime.onnxruntime_engine import OnnxRuntimeEngine
from trt_runtime.pipeline import Picture, generate, load_source_pipeline

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Beside:
    """ONNX Runtime's pictures beside PyTorch's: mean relative error of latents, both accuracies."""

    error: float
    accuracy: float
    expected_accuracy: float


def bundle_and_pipeline(
    name: str, dtype: str, folder: Path, *, device: str, pictures: int
) -> tuple[Path, Any]:
    """Export a pipeline of the testbed with its plan, for calls of so many pictures."""
    pipe = load_source_pipeline(str(TESTBED / name), dtype=DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    plan, bundle = plan_of(name), folder / f"{name}-{dtype}"
    rows = pictures * (2 if plan.sampler.cfg else 1)
    source = str(TESTBED / name)
    export_bundle(
        pipe.transformer, plan, bundle, dtype=dtype, batch=rows, source=source, dense=False
    )
    return bundle, pipe.to(device)


def pictures_on(
    backend: str, bundle: Path, pipe: Any, captions: Sequence[str], device: str
) -> list[Picture]:
    """Draw every caption; the caches are poisoned between the calls."""
    attach(pipe, bundle, backend=backend, device=device, poison=True)
    try:
        return generate(pipe, captions)
    finally:
        detach(pipe)


def beside_torch(bundle: Path, pipe: Any, captions: Sequence[str], device: str) -> Beside:
    """Draw the captions on both backends."""
    expected, got = (
        pictures_on(backend, bundle, pipe, captions, device) for backend in ("torch", "onnxruntime")
    )
    errors = [error(a.latents, b.latents) for a, b in zip(got, expected, strict=True)]
    marks = [
        reader.score(captions, [p.image for p in made])["accuracy"] for made in (got, expected)
    ]
    return Beside(sum(errors) / len(errors), *marks)


@contextmanager
def recorded_places() -> Iterator[None]:
    """Let the sessions that are opened meanwhile note which provider takes which node."""
    own = OnnxRuntimeEngine._options

    def options(self: OnnxRuntimeEngine, ort: Any) -> Any:
        made = own(self, ort)
        made.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return made

    OnnxRuntimeEngine._options = options  # type: ignore[method-assign]
    try:
        yield
    finally:
        OnnxRuntimeEngine._options = own  # type: ignore[method-assign]


def nodes_by_provider(engines: Sequence[OnnxRuntimeEngine]) -> Counter[str]:
    """Count the nodes of active engines that were opened under `recorded_places`."""
    counts: Counter[str] = Counter()
    for engine in engines:
        for part in engine._active().get_provider_graph_assignment_info():
            counts[part.ep_name] += len(part.get_nodes())
    return counts
