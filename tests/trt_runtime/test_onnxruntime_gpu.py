"""ONNX Runtime's CUDA provider beside PyTorch's backend: whole runs, 2K shapes, memory, places."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plans.bundle import GraphSpec, TensorSpec
from plans.errors import ArrowheadError
from tests.testbed.evaluate import held_out_captions
from tests.testbed.models import NAMES, missing
from tests.trt_runtime import real_shapes
from trt_runtime import attach, detach
from trt_runtime import onnxruntime_cuda as cuda
from trt_runtime.engine import allocate
from trt_runtime.onnxruntime_engine import (
    OnnxRuntimeEngine,
    SessionSettings,
    SharedWeights,
    runtime,
)
from trt_runtime.onnxruntime_operators import VARIABLE, find_operators
from trt_runtime.parity import compare_graphs
from trt_runtime.pipeline import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from exporter import export_bundle  # noqa: E402
from tests.trt_runtime.onnxruntime_runs import (  # noqa: E402
    beside_torch,
    bundle_and_pipeline,
    nodes_by_provider,
    pictures_on,
    recorded_places,
)
from tests.trt_runtime.test_onnxruntime_engine import ROWS, WIDTH, write_graph  # noqa: E402

# Mean relative error of the final latents: that of the compiled backend in bf16, less in fp16.
TOLERANCE = {"fp16": 0.02, "bf16": 0.05}
CAPTIONS, AT_ONCE = 64, 8
MB = 2**20


@pytest.fixture(scope="module", autouse=True)
def _provider() -> Iterator[None]:
    """The operators' kernels where they are built: other tests take the function bodies."""
    if cuda.PROVIDER not in runtime().get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu")
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get(VARIABLE):
            patch.delenv(VARIABLE, raising=False)
        yield


def product(folder: Path) -> tuple[OnnxRuntimeEngine, Any, torch.Tensor]:
    """y = x W: the engine, not yet active, its buffers, and W. The graph's own file holds zeros."""
    matrix = torch.randn(ROWS, WIDTH)
    matrix.numpy().tofile(folder / "weights.bin")
    graph = write_graph(folder, "g")
    weights = SharedWeights(folder / "weights.bin", "cuda")
    engine = OnnxRuntimeEngine(folder, graph, weights, SessionSettings(device="cuda"))
    buffers = {"x": torch.zeros(5, ROWS, device="cuda")}, allocate(graph.outputs, 5, "cuda")
    return engine, buffers, matrix.cuda()


def test_shared_weights_and_the_callers_stream(tmp_path: Path) -> None:
    engine, (feeds, outputs), matrix = product(tmp_path)
    side = torch.cuda.Stream()
    with engine:
        run = engine.bind(feeds, outputs)
        for stream in (torch.cuda.default_stream(), side, side):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # ten milliseconds: x is still to be written
                feeds["x"].normal_()
                run()
                got, expected = outputs["y"].clone(), feeds["x"] @ matrix
                torch.testing.assert_close(got, expected)


def test_a_run_does_not_wait_for_the_device(tmp_path: Path) -> None:
    engine, (feeds, outputs), _ = product(tmp_path)
    with engine:
        run = engine.bind(feeds, outputs)
        run()  # the first allocates
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.cuda._sleep(2_000_000_000)  # a second
        run()
        launched = time.perf_counter() - started
        torch.cuda.synchronize()
        assert launched < 0.3 < time.perf_counter() - started


@pytest.fixture(scope="module", params=[(n, d) for d in ("fp16", "bf16") for n in NAMES], ids=str)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name, dtype = request.param
    if reason := missing(name):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("bundles")
    return dtype, *bundle_and_pipeline(name, dtype, folder, device="cuda", pictures=AT_ONCE)


def test_pictures_are_those_of_pytorch(drawn: Any) -> None:
    dtype, bundle, pipe = drawn
    started = time.perf_counter()
    got = beside_torch(bundle, pipe, held_out_captions(CAPTIONS), "cuda")
    print(f"{bundle.name}: {got}, {time.perf_counter() - started:.1f} s, {find_operators()}")
    assert got.error < TOLERANCE[dtype]
    assert got.expected_accuracy > 0.8
    assert abs(got.accuracy - got.expected_accuracy) < 0.02


def test_function_bodies_draw_them_too(drawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, bundle, pipe = drawn
    monkeypatch.setenv(VARIABLE, "")
    assert beside_torch(bundle, pipe, held_out_captions(AT_ONCE), "cuda").error < TOLERANCE[dtype]


def test_no_node_is_on_the_cpu(drawn: Any) -> None:
    _, bundle, pipe = drawn
    with recorded_places():
        proxy = attach(pipe, bundle, backend="onnxruntime", device="cuda")
    counts = nodes_by_provider(list(proxy.engines.values()))
    detach(pipe)
    assert set(counts) == {cuda.PROVIDER} and counts.total() > 100


def test_fifty_pictures_take_no_memory(drawn: Any) -> None:
    _, bundle, pipe = drawn
    captions = held_out_captions(AT_ONCE)
    proxy = attach(pipe, bundle, backend="onnxruntime", device="cuda")

    def held() -> tuple[int, int]:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.memory_allocated(), total - free

    for _ in range(2):
        generate(pipe, captions)
    before = held()
    for _ in range(50 // AT_ONCE + 1):
        generate(pipe, captions)
    after = held()
    assert proxy.state.buckets_run == list(proxy.plan.schedule)
    detach(pipe)
    print(f"{bundle.name}: {[(b - a) / MB for a, b in zip(before, after, strict=True)]} MB")
    assert after[0] <= before[0] + MB
    assert after[1] <= before[1] + 8 * MB


def test_reopened_sessions_take_no_memory(drawn: Any) -> None:
    _, bundle, pipe = drawn
    captions = held_out_captions(AT_ONCE)
    for _ in range(2):
        made = pictures_on("onnxruntime", bundle, pipe, captions, "cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        again = pictures_on("onnxruntime", bundle, pipe, captions, "cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] < 16 * MB
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(made, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_buckets_at_2k_are_those_of_pytorch(kind: str, dtype: str, tmp_path: Path) -> None:
    if find_operators() is None:  # a function body holds all weights of attention at once
        pytest.skip("no libarrowhead_onnxruntime.so: make plugins")
    started = time.perf_counter()
    model = real_shapes.model_of(kind, real_shapes.DTYPES[dtype])
    plan, batch = real_shapes.plan_of(model, kind), 2 if kind == "sd3" else 1
    export_bundle(model, plan, tmp_path / "bundle", dtype=dtype, batch=batch, dense=False)
    exported = time.perf_counter() - started
    rows = compare_graphs(tmp_path / "bundle", transformer=model.cuda(), device="cuda")
    print(f"{kind}, {dtype}: export {exported:.0f} s, {time.perf_counter() - started:.0f} s")
    print(*rows, sep="\n")
    assert len(rows) == len(plan.buckets) and [row for row in rows if not row.passed] == []


def test_a_node_without_a_kernel_there_is_named_as_such(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Det", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, ["B", 3, 3])],
        [helper.make_tensor_value_info("y", kind, ["B"])],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "weights.bin").write_bytes(bytes(64))
    spec = GraphSpec(
        "g.onnx",
        0,
        (TensorSpec("x", "float32", ("B", 3, 3)),),
        (TensorSpec("y", "float32", ("B",)),),
        (),
    )
    engine = OnnxRuntimeEngine(
        tmp_path, spec, SharedWeights(tmp_path / "weights.bin", "cuda"),
        SessionSettings(device="cuda"),
    )  # fmt: skip
    with pytest.raises(ArrowheadError, match="kernels on the device for every node"), engine:
        pass
