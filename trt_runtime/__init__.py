"""Run Arrowhead bundles: engines, caches across steps, drop-in transformers for diffusers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trt_runtime.attachment import attach, detach
    from trt_runtime.bundles import load_transformer
    from trt_runtime.engine import Engine
    from trt_runtime.pipeline import load_pipeline, pipeline_kwargs

__all__ = ["Engine", "attach", "detach", "load_pipeline", "load_transformer", "pipeline_kwargs"]

_HOME = {
    "Engine": "engine",
    "attach": "attachment",
    "detach": "attachment",
    "load_pipeline": "pipeline",
    "load_transformer": "bundles",
    "pipeline_kwargs": "pipeline",
}


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; `arrowhead --help` and the plan verbs do without.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"trt_runtime.{_HOME[name]}"), name)
