"""Graphs of a transformer that is there already, for the rows of bench e2e that run graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from plans.architectures import Architecture
from plans.bundle import Bundle
from plans.errors import ArrowheadError
from plans.plan import Plan
from trt_runtime.bench_steps import Mixes
from trt_runtime.step_onnxruntime import GraphSettings, check_sessions
from trt_runtime.step_runners import ONNXRUNTIME, Settings


def graph_settings(
    architecture: Architecture,
    rows: Sequence[tuple[str, Mixes]],
    settings: Settings,
    folder: Path | None,
) -> GraphSettings | None:
    """Give how rows of ONNX Runtime are exported, None where there are none.

    Raises ArrowheadError if they could not run here, or the exporter's packages are missing.
    """
    if ONNXRUNTIME not in [backend for backend, _ in rows]:
        return None
    check_sessions(settings.device, settings.dtype)
    try:
        from exporter import export_bundle
    except ImportError as error:
        raise ArrowheadError(
            f"variant {ONNXRUNTIME}",
            got=f"no module {error.name}",
            expected="the packages that export graphs",
            fix="pip install 'arrowhead[export]'",
        ) from error

    def export(model: nn.Module, plan: Plan, target: Path, buckets: Sequence[int]) -> Bundle:
        return export_bundle(
            model, plan, target, dtype=settings.dtype, batch=architecture.rows, dense=False,
            buckets=buckets,
        )  # fmt: skip

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return GraphSettings(export, folder)
