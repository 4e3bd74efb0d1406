"""The TensorRT backend on a GPU: what it rests on in PyTorch, and engines that run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plans.bundle import WeightSpec
from plans.errors import ArrowheadError
from tests import tiny
from trt_runtime.build import build
from trt_runtime.device_weights import DeviceWeights
from trt_runtime.parity import compare_graphs
from trt_runtime.tensorrt_engine import current_stream, record
from trt_runtime.tensorrt_library import find_plugin_library, tensorrt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def test_a_recorded_run_follows_its_buffers_and_the_callers_stream() -> None:
    device = torch.device("cuda")
    x, y = torch.ones(1 << 20, device=device), torch.zeros(1 << 20, device=device)
    launches = []

    def enqueue(stream: int) -> None:
        launches.append(stream)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.mul(x, 3, out=y)

    replay = record(enqueue, device)
    assert len(launches) == 2 and launches[0] == launches[1] != current_stream(device)
    torch.testing.assert_close(y, 3 * x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert current_stream(device) == side.cuda_stream
        x.fill_(2)
        replay()
        z = y + 1
    side.synchronize()
    assert len(launches) == 2
    assert float(z.min()) == float(z.max()) == 7


def test_weights_are_copied_to_the_device_once(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 4)
    weights = DeviceWeights(tmp_path / "weights.bin", "cuda")
    whole = weights.bytes_of(WeightSpec("a", 0, 1024, "float16", (2, 256)))
    rows = weights.bytes_of(WeightSpec("a.rows_1_2", 512, 512, "float16", (1, 256)))
    odd = weights.bytes_of(WeightSpec("b", 100, 28, "float16", (1, 14)))
    assert rows.data_ptr() == whole.data_ptr() + 512
    assert odd.data_ptr() % 256 == 0 and odd.tolist() == list(range(100, 128))


@pytest.mark.trt
@pytest.mark.parametrize("weights", ["shared", "embedded"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_engines_agree_with_pytorch(dtype: str, weights: str, tmp_path: Path) -> None:
    try:
        found = tensorrt()
    except ArrowheadError as error:
        pytest.skip(f"no TensorRT: {error.fix}")
    if found.is_rtx and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("TensorRT-RTX does not run on compute capability 9.0")
    if find_plugin_library() is None:
        pytest.skip("no libarrowhead_trt.so: run `make plugins`, which needs nvcc")
    pytest.importorskip("onnxscript")
    from exporter import export_bundle

    model = tiny.tiny_sd3(num_layers=2, attention_head_dim=64, caption_projection_dim=256)
    model = model.to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    plan = tiny.random_plan(model, buckets=2, steps=4)
    export_bundle(model, plan, tmp_path / "bundle", dtype=dtype, batch=2)
    bundle = build(tmp_path / "bundle", backend="tensorrt", device="cuda", weights=weights)
    assert all(engine.verified for engine in bundle.engines)
    results = compare_graphs(
        tmp_path / "bundle", backend="tensorrt", transformer=model.cuda(), device="cuda"
    )
    assert [row for row in results if not row.passed] == []
