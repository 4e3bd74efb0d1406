"""The TensorRT backend against a stand-in for the runtime (fake_tensorrt.py): no GPU is used.

What is tested: what addresses are bound in which order, what is captured and when, what engines
share, and that an engine that does not fit is not activated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from plans.bundle import BatchRange, WeightSpec
from plans.errors import ArrowheadError
from tests.trt_runtime import fake_tensorrt as fake
from tests.trt_runtime.fake_engines import MATRIX, PLUGIN, ROWS, Built, buffers_of, graph_of
from trt_runtime import tensorrt_engine
from trt_runtime.tensorrt_engine import TensorRTEngine
from trt_runtime.tensorrt_library import TensorRT
from trt_runtime.tensorrt_metadata import metadata_path

STREAM = 77


@pytest.fixture
def trt() -> TensorRT:
    return TensorRT(fake.api(), "TensorRT", "11.4.0", fake.Logger())


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, trt: TensorRT) -> Iterator[list[str]]:
    """Let the stand-in be what is installed; list captures and replays."""
    events: list[str] = []

    def record(enqueue: Callable[[int], None], device: torch.device) -> Callable[[], None]:
        events.append("capture")
        enqueue(STREAM)
        return lambda: events.append("replay")

    monkeypatch.setattr(tensorrt_engine, "tensorrt", lambda: trt)
    monkeypatch.setattr(tensorrt_engine, "load_plugins", lambda: PLUGIN)
    monkeypatch.setattr(tensorrt_engine, "compute_capability", lambda device: "9.0")
    monkeypatch.setattr(tensorrt_engine, "current_stream", lambda device: STREAM)
    monkeypatch.setattr(tensorrt_engine, "record", record)
    yield events


@pytest.fixture
def built(tmp_path: Path, captures: list[str]) -> Built:
    return Built(tmp_path, graph_of("bucket_0"), graph_of("bucket_1"))


def context_of(engine: TensorRTEngine) -> fake.Context:
    return engine._context


def test_addresses_are_bound_before_the_launch(built: Built) -> None:
    graph = built.bundle.graphs[0]
    built.write(graph)
    feeds, outputs = buffers_of(graph)
    with built.engine(graph) as engine:
        engine.run(feeds, outputs)
        calls = context_of(engine).calls
        block = built.memory.block()
    file = built.weights.bytes_of(MATRIX)
    rows = built.weights.bytes_of(ROWS)
    assert calls == [
        ("set_device_memory", block.data_ptr(), 1000),
        ("set_tensor_address", "hidden_states", feeds["hidden_states"].data_ptr()),
        ("set_tensor_address", "cache_in.a.0", feeds["cache_in.a.0"].data_ptr()),
        ("set_tensor_address", "sample", outputs["sample"].data_ptr()),
        ("set_tensor_address", MATRIX.name, file.data_ptr()),
        ("set_tensor_address", ROWS.name, rows.data_ptr()),
        ("execute_async_v3", STREAM),
    ]


def test_rows_that_are_not_aligned_are_copied_once(built: Built) -> None:
    whole = built.weights.bytes_of(MATRIX)
    assert built.weights.bytes_of(ROWS).data_ptr() == whole.data_ptr() + 256
    odd = WeightSpec("to_q.weight.rows_4_16", 128, 384, "float16", (12, 16))
    rows = built.weights.bytes_of(odd)
    assert rows is built.weights.bytes_of(odd)
    assert rows.tolist() == (list(range(256)) * 2)[128:512]


def test_one_capture_for_one_set_of_buffers(built: Built, captures: list[str]) -> None:
    graph = built.bundle.graphs[0]
    built.write(graph)
    first, second = buffers_of(graph), buffers_of(graph)
    with built.engine(graph) as engine:
        runs = [engine.bind(*first), engine.bind(*first), engine.bind(*second)]
        assert captures == ["capture", "capture"]
        for run in runs:
            run()
        assert captures[2:] == ["replay"] * 3
        engine.run(*first)  # once: not worth a capture
        assert len(captures) == 5
    with built.engine(graph) as engine:  # captured graphs go with the context they were made on
        engine.bind(*first)
    assert captures.count("capture") == 3


def test_inlined_bodies_are_launched_anew_each_time(built: Built, captures: list[str]) -> None:
    graph = built.bundle.graphs[0]
    built.write(graph, plugin=None, operators={"transformer_blocks.0.attn": "function"})
    with built.engine(graph) as engine:
        run = engine.bind(*buffers_of(graph))
        run()
        run()
        launched = [call for call in context_of(engine).calls if call[0] == "execute_async_v3"]
    assert launched == [("execute_async_v3", STREAM)] * 2
    assert captures == []


def test_engines_share_the_largest_working_memory(built: Built) -> None:
    small, large = built.bundle.graphs
    built.write(small, activation_bytes=500)
    built.write(large, activation_bytes=4000)
    with built.engine(small) as first, built.engine(large) as second:
        first.run(*buffers_of(small))
        second.run(*buffers_of(large))
        memory = [context_of(engine).calls[0] for engine in (first, second)]
    assert memory[0] == memory[1]
    assert memory[0][2] == 4000


def test_a_dynamic_batch_is_told_before_the_addresses(tmp_path: Path, captures: list[str]) -> None:
    graph = graph_of(batch="B")
    built = Built(tmp_path, graph, batches=BatchRange(1, 2, 4))
    built.write(graph, batch=[1, 2, 8])
    with pytest.raises(
        ArrowheadError, match=r"rows \[1, 2, 8\]; expected the bundle's \[1, 2, 4\]"
    ):
        built.engine(graph).__enter__()
    built.write(graph, batch=[1, 2, 4])
    with built.engine(graph) as engine:
        feeds, outputs = buffers_of(graph, batch=3)
        engine.run(feeds, outputs)
        calls = [call for call in context_of(engine).calls if call[0] == "set_input_shape"]
        for rows in (3, 2):  # of the same buffers: a capture each
            engine.bind(
                {n: t[:rows] for n, t in feeds.items()}, {"sample": outputs["sample"][:rows]}
            )
        assert captures == ["capture", "capture"]
    assert calls == [
        ("set_input_shape", "hidden_states", (3, 4, 8)),
        ("set_input_shape", "cache_in.a.0", (3, 6, 1, 8)),
    ]


def test_stripped_engines_get_their_weights_from_the_graph(built: Built) -> None:
    graph = built.bundle.graphs[0]
    built.write(graph, weights="stripped")
    with built.engine(graph) as engine:
        assert engine._engine.refitted_from == str(built.folder / graph.file)


def test_an_engine_built_ahead_of_time_is_for_every_gpu(built: Built) -> None:
    graph = built.bundle.graphs[0]
    built.write(graph, compute_capability=None)
    with built.engine(graph) as engine:
        assert engine.activation_bytes == 1000


def test_an_engine_that_does_not_fit_is_not_activated(built: Built) -> None:
    graph = built.bundle.graphs[0]
    built.write(graph, compute_capability="8.9")
    engine = built.engine(graph)
    with pytest.raises(ArrowheadError, match="expected this GPU's 9.0"), engine:
        pass
    with pytest.raises(ArrowheadError, match="outside its `with` block"):
        engine.run(*buffers_of(graph))


def test_truncated_damaged_and_missing_files_are_refused(built: Built) -> None:
    graph = built.bundle.graphs[0]
    path = built.write(graph)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ArrowheadError, match="it is truncated"), built.engine(graph):
        pass
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(ArrowheadError, match="it is damaged"), built.engine(graph):
        pass
    metadata_path(path).unlink()
    with (
        pytest.raises(ArrowheadError, match="no file bucket_0.engine.json; .*arrowhead build"),
        built.engine(graph),
    ):
        pass


def test_what_tensorrt_says_is_shown(built: Built) -> None:
    graph = built.bundle.graphs[0]
    content = b"not an engine"
    path = built.write(
        graph, engine_bytes=len(content), engine_sha256=hashlib.sha256(content).hexdigest()
    )
    path.write_bytes(content)
    with (
        pytest.raises(ArrowheadError, match="got deserializeCudaEngine: no engine; expected"),
        built.engine(graph),
    ):
        pass
    built.write(graph)
    for fails in ("set_tensor_address", "execute_async_v3"):
        with built.engine(graph) as engine:
            context_of(engine).fails = fails
            with pytest.raises(ArrowheadError, match=f"got {fails} is out of order"):
                engine.run(*buffers_of(graph))


def test_an_engine_of_other_tensors_is_refused(built: Built) -> None:
    graph = built.bundle.graphs[0]
    built.write(graph, shared_weights=[MATRIX.name])
    with pytest.raises(ArrowheadError, match="tensors of engine .*rows_8_16"), built.engine(graph):
        pass


def test_lifecycle_and_buffers(built: Built) -> None:
    graph = built.bundle.graphs[0]
    built.write(graph)
    engine = built.engine(graph)
    feeds, outputs = buffers_of(graph)
    with pytest.raises(ArrowheadError, match="a call outside its `with` block"):
        engine.run(feeds, outputs)
    with engine:
        with pytest.raises(ArrowheadError, match="a second activation"):
            engine.__enter__()
        with pytest.raises(ArrowheadError, match="tensor hidden_states of bucket_0.engine"):
            engine.bind({**feeds, "hidden_states": torch.zeros(1)}, outputs)
        room = torch.zeros(2 * 4 * 8 + 256, dtype=torch.float16)
        start = (-room.data_ptr() % 256) // 2 + 1
        odd = room[start : start + 64].view(2, 4, 8)
        with pytest.raises(ArrowheadError, match="expected a multiple of 256"):
            engine.bind({**feeds, "hidden_states": odd}, outputs)
    with engine:  # and once more
        engine.run(feeds, outputs)
