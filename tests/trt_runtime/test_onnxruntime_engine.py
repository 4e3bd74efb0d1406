"""The ONNX Runtime engine on small hand-made graphs: binding, shared weights, explained errors."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plans.bundle import GraphSpec, TensorSpec, WeightSpec
from plans.errors import ArrowheadError
from trt_runtime import onnxruntime_cuda, onnxruntime_engine
from trt_runtime.engine import allocate
from trt_runtime.onnxruntime_engine import OnnxRuntimeEngine, SessionSettings, SharedWeights

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper = onnx.helper
FLOAT = onnx.TensorProto.FLOAT

ROWS, WIDTH = 6, 4


def write_graph(folder: Path, name: str, operator: str = "MatMul", rows: int = ROWS) -> GraphSpec:
    """x [B, rows] -> y = operator(x, W), W being the first rows of the weights file's matrix."""
    weight = onnx.TensorProto(name="W", data_type=FLOAT, dims=[rows, WIDTH])
    weight.data_location = onnx.TensorProto.EXTERNAL
    # The file named here holds zeros: the values must come from the shared map.
    (folder / "zeros.bin").write_bytes(bytes(rows * WIDTH * 4))
    for key, value in (("location", "zeros.bin"), ("offset", "0"), ("length", str(rows * 16))):
        weight.external_data.add(key=key, value=value)
    domain = "" if operator == "MatMul" else "arrowhead"
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "W"], ["y"], domain=domain)],
        name,
        [helper.make_tensor_value_info("x", FLOAT, ["B", rows])],
        [helper.make_tensor_value_info("y", FLOAT, ["B", WIDTH])],
        [weight],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("arrowhead", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    return GraphSpec(
        f"{name}.onnx",
        0,
        (TensorSpec("x", "float32", ("B", rows)),),
        (TensorSpec("y", "float32", ("B", WIDTH)),),
        (WeightSpec("W", 0, rows * WIDTH * 4, "float32", (rows, WIDTH)),),
    )


@pytest.fixture
def matrix(tmp_path: Path) -> torch.Tensor:
    values = np.random.default_rng(0).standard_normal((ROWS, WIDTH), dtype=np.float32)
    values.tofile(tmp_path / "weights.bin")
    return torch.from_numpy(values)


def engine_of(folder: Path, graph: GraphSpec, **settings: int) -> OnnxRuntimeEngine:
    weights = SharedWeights(folder / "weights.bin")
    return OnnxRuntimeEngine(folder, graph, weights, SessionSettings(**settings))


def test_binds_torch_buffers_and_shared_weights(tmp_path: Path, matrix: torch.Tensor) -> None:
    weights = SharedWeights(tmp_path / "weights.bin")
    for name, rows in (("all", ROWS), ("slice", 3)):
        graph = write_graph(tmp_path, name, rows=rows)
        feeds, outputs = {"x": torch.randn(5, rows)}, allocate(graph.outputs, 5)
        with OnnxRuntimeEngine(tmp_path, graph, weights) as engine:
            run = engine.bind(feeds, outputs)
            for _ in range(2):
                feeds["x"].normal_()
                run()
                torch.testing.assert_close(outputs["y"], feeds["x"] @ matrix[:rows])


def test_one_value_for_one_byte_range(tmp_path: Path, matrix: torch.Tensor) -> None:
    weights = SharedWeights(tmp_path / "weights.bin")
    spec = WeightSpec("a", 0, 96, "float32", (ROWS, WIDTH))
    assert weights.value(spec) is weights.value(WeightSpec("b", 0, 96, "float32", (ROWS, WIDTH)))
    assert weights.value(spec).data_ptr() == weights._bytes.ctypes.data


def test_lifecycle(tmp_path: Path, matrix: torch.Tensor) -> None:
    graph = write_graph(tmp_path, "g")
    engine = engine_of(tmp_path, graph)
    feeds, outputs = {"x": torch.randn(1, ROWS)}, allocate(graph.outputs, 1)
    with pytest.raises(ArrowheadError, match="engine g.onnx .* outside its `with` block"):
        engine.run(feeds, outputs)
    with engine, pytest.raises(ArrowheadError, match="second activation"):
        engine.__enter__()


def test_thread_count_and_profile(tmp_path: Path, matrix: torch.Tensor) -> None:
    graph = write_graph(tmp_path, "g")
    settings = SessionSettings(threads=1, profile=tmp_path)
    weights = SharedWeights(tmp_path / "weights.bin")
    with OnnxRuntimeEngine(tmp_path, graph, weights, settings) as engine:
        assert engine._session.get_session_options().intra_op_num_threads == 1
        engine.run({"x": torch.randn(1, ROWS)}, allocate(graph.outputs, 1))
        assert set(engine.end_profile()) == {"MatMul"}


def test_threads_that_wait_leave_the_cores_to_others(tmp_path: Path, matrix: torch.Tensor) -> None:
    """The next bucket's session has threads of its own, and PyTorch too."""
    graph = write_graph(tmp_path, "g")
    busy = []
    with engine_of(tmp_path, graph, threads=4) as engine:
        run = engine.bind({"x": torch.randn(200_000, ROWS)}, allocate(graph.outputs, 200_000))
        for _ in range(5):
            run()
            begin = time.process_time()
            time.sleep(0.1)
            busy.append(time.process_time() - begin)
    assert min(busy) < 0.01  # threads that spin take 0.04 to 0.13 s


def test_wrong_buffer_is_refused_at_binding(tmp_path: Path, matrix: torch.Tensor) -> None:
    graph = write_graph(tmp_path, "g")
    with (
        engine_of(tmp_path, graph) as engine,
        pytest.raises(ArrowheadError, match="tensor x of g.onnx"),
    ):
        engine.bind({"x": torch.randn(1, 2)}, allocate(graph.outputs, 1))


def test_unknown_operator_is_explained(tmp_path: Path, matrix: torch.Tensor) -> None:
    graph = write_graph(tmp_path, "g", operator="ArrowAttention")
    with (
        pytest.raises(ArrowheadError, match="graph g.onnx .* operators this ONNX Runtime knows"),
        engine_of(tmp_path, graph),
    ):
        pass


def test_damaged_file_is_explained(tmp_path: Path, matrix: torch.Tensor) -> None:
    graph = write_graph(tmp_path, "g")
    (tmp_path / graph.file).write_bytes(b"not a graph" * 40)
    with (
        pytest.raises(ArrowheadError, match="graph g.onnx .* the file is damaged: export"),
        engine_of(tmp_path, graph),
    ):
        pass


def test_missing_runtime_is_explained(
    tmp_path: Path, matrix: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    onnxruntime_engine.runtime.cache_clear()
    with (
        pytest.raises(ArrowheadError, match=r"no module onnxruntime.* pip install 'arrowhead\["),
        engine_of(tmp_path, write_graph(tmp_path, "g")),
    ):
        pass
    onnxruntime_engine.runtime.cache_clear()


def test_missing_cuda_provider_is_explained(tmp_path: Path, matrix: torch.Tensor) -> None:
    if "CUDAExecutionProvider" in onnxruntime_engine.runtime().get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    graph = write_graph(tmp_path, "g")
    engine = OnnxRuntimeEngine(
        tmp_path, GraphSpec(graph.file, 0, (), (), ()), SharedWeights(tmp_path / "weights.bin"),
        SessionSettings(device="cuda"),
    )  # fmt: skip
    with pytest.raises(ArrowheadError, match="device cuda .*onnxruntime-gpu"), engine:
        pass


def test_embedded_weights_come_from_the_graphs_own_file(
    tmp_path: Path, matrix: torch.Tensor
) -> None:
    graph = write_graph(tmp_path, "g")
    weights = SharedWeights(tmp_path / "weights.bin")
    feeds, outputs = {"x": torch.randn(1, ROWS)}, allocate(graph.outputs, 1)
    settings = SessionSettings(weights="embedded")
    with OnnxRuntimeEngine(tmp_path, graph, weights, settings) as engine:
        engine.run(feeds, outputs)
    assert outputs["y"].abs().max() == 0
    with pytest.raises(ArrowheadError, match="weights .* got packed; expected one of"):
        SessionSettings(weights="packed")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned "
            "to the default CPU EP, but fallback to CPU EP has been explicitly disabled by the "
            "user.",
            "kernels on the device for every node.*--dtype fp16",
        ),
        ("CUDA failure 35: CUDA driver version is insufficient", "driver and libraries can run"),
    ],
)
def test_what_cuda_refuses_is_explained(text: str, match: str) -> None:
    with pytest.raises(ArrowheadError, match=match):
        raise onnxruntime_engine._explain(Path("g.onnx"), RuntimeError(text))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_explained() -> None:
    with pytest.raises(ArrowheadError, match="a GPU that PyTorch has too"):
        onnxruntime_cuda.check_cuda("cuda")


def test_an_older_runtime_on_cuda_is_explained(
    tmp_path: Path, matrix: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = SharedWeights(tmp_path / "weights.bin", "cuda")
    monkeypatch.setattr(
        onnxruntime_engine, "runtime", lambda: SimpleNamespace(OrtValue=SimpleNamespace())
    )
    with pytest.raises(ArrowheadError, match="without from_dlpack.*pip install -U"):
        weights.value(WeightSpec("a", 0, 96, "float32", (ROWS, WIDTH)))
