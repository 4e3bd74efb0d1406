"""The trained pipelines with their plans on ONNX Runtime's CPU provider, as on CUDA's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testbed.evaluate import held_out_captions
from tests.testbed.models import NAMES, missing
from trt_runtime import attach, detach

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from tests.trt_runtime.onnxruntime_runs import (  # noqa: E402
    beside_torch,
    bundle_and_pipeline,
    nodes_by_provider,
    recorded_places,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_whole_runs_and_places(name: str, tmp_path: Path) -> None:
    if reason := missing(name):
        pytest.skip(reason)
    bundle, pipe = bundle_and_pipeline(name, "fp32", tmp_path, device="cpu", pictures=1)
    got = beside_torch(bundle, pipe, held_out_captions(2), "cpu")
    assert got.error < 1e-4 and got.accuracy == got.expected_accuracy > 0.5
    with recorded_places():
        proxy = attach(pipe, bundle, backend="onnxruntime", device="cpu")
    counts = nodes_by_provider(list(proxy.engines.values()))
    detach(pipe)
    assert set(counts) == {"CPUExecutionProvider"} and counts.total() > 100
