"""Bucket graphs on TensorRT: one context an engine, buffers by address, a CUDA graph a binding."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from plans.bundle import Bundle, GraphSpec
from plans.errors import ArrowheadError
from trt_runtime.device_weights import ALIGNMENT, DeviceWeights
from trt_runtime.engine import check_active, check_buffers, check_inactive
from trt_runtime.tensorrt_library import TensorRT, last_error, load_plugins, tensorrt
from trt_runtime.tensorrt_metadata import (
    EngineMetadata,
    check_bytes,
    check_engine,
    engine_path,
    load_metadata,
)
from trt_runtime.tensorrt_network import dtype_name


class ActivationMemory:
    """Working memory that the engines of one bundle share: only one of them runs at a time."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._needed = 0
        self._block: Tensor | None = None

    def reserve(self, nbytes: int) -> None:
        """Say what an engine needs; all do so before the first of them is bound."""
        self._needed = max(self._needed, nbytes)

    def block(self) -> Tensor:
        """Give memory for the largest need so far, uint8, never moved.

        A need that grew since gets a new block; bindings made before keep theirs alive.
        """
        if self._block is None or self._block.nbytes < self._needed:
            self._block = torch.empty(max(self._needed, 1), dtype=torch.uint8, device=self._device)
        return self._block


class TensorRTEngine:
    """The engine file that `arrowhead build --backend tensorrt` made of one graph."""

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        graph: GraphSpec,
        weights: DeviceWeights,
        activations: ActivationMemory,
        device: torch.device | str = "cuda",
    ) -> None:
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self.device = torch.device(device)
        self.path = engine_path(folder, graph)
        self._folder, self._bundle, self._graph = folder, bundle, graph
        self._weights = weights
        self._activations = activations
        self._trt: TensorRT | None = None
        self._metadata: EngineMetadata | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        # What a binding fixes, addresses and dynamic shapes -> the graph captured with it.
        self._captured: dict[tuple[Any, ...], Callable[[], None]] = {}

    def __enter__(self) -> Self:
        check_inactive(f"engine {self.path.name}", self._context is not None)
        trt, capability = tensorrt(), compute_capability(self.device)
        metadata = load_metadata(self.path)
        plugin = load_plugins() if metadata.plugin is not None else None
        check_engine(
            self.path, metadata, self._folder, self._bundle, self._graph, trt, plugin, capability
        )
        with on_device(self.device):
            runtime = trt.api.Runtime(trt.logger)
            engine = _deserialize(trt, runtime, self.path, metadata)
            if metadata.weights == "stripped":
                _refit(trt, engine, self._folder / self._graph.file)
            _check_io(trt, engine, self.path, self._graph, metadata)
            strategy = trt.api.ExecutionContextAllocationStrategy.USER_MANAGED
            self._context = engine.create_execution_context(strategy)
        if self._context is None:
            raise _failure(trt, self.path, "an execution context")
        self._trt, self._metadata = trt, metadata
        self._runtime, self._engine = runtime, engine
        self._activations.reserve(self.activation_bytes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        # In this order: each belongs to the next.
        self._captured = {}
        self._context = None
        self._engine = None
        self._runtime = self._metadata = None

    @property
    def activation_bytes(self) -> int:
        """Device memory that one run needs beside weights and buffers."""
        return int(self._active().device_memory_size_v2)

    def bind(
        self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Callable[[], None]:
        """Check the buffers and capture a run on them, which runs once for that.

        Run what this gives on the stream that is current where it is called.
        """
        enqueue, key = self._enqueue(feeds, outputs)
        assert self._metadata is not None
        if not self._metadata.capturable:
            return lambda: enqueue(current_stream(self.device))
        if key not in self._captured:
            with on_device(self.device):
                self._captured[key] = record(enqueue, self.device)
        replay = self._captured[key]
        kept = (enqueue,)  # it holds the buffers, whose addresses are all that a graph knows

        def run() -> None:
            if kept:
                replay()

        return run

    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        enqueue, _ = self._enqueue(feeds, outputs)
        enqueue(current_stream(self.device))

    def _enqueue(
        self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Callable[[int], None], tuple[Any, ...]]:
        """Check buffers; give a call that launches on a stream, and what it has fixed."""
        self._active()
        check_buffers(self.path.name, self.inputs, feeds, self.device)
        check_buffers(self.path.name, self.outputs, outputs, self.device)
        assert self._metadata is not None and self._trt is not None
        shared = set(self._metadata.shared_weights)
        weights = {
            spec.name: self._weights.bytes_of(spec)
            for spec in self._graph.weights
            if spec.name in shared
        }
        buffers = {**feeds, **outputs, **weights}
        shapes = {s.name: tuple(feeds[s.name].shape) for s in self.inputs if "B" in s.shape}
        block = self._activations.block()
        for name, buffer in buffers.items():
            if buffer.data_ptr() % ALIGNMENT:
                raise ArrowheadError(
                    f"tensor {name} of {self.path.name}",
                    got=f"address {buffer.data_ptr():#x}",
                    expected=f"a multiple of {ALIGNMENT}",
                    fix="allocate the buffer with trt_runtime.engine.allocate",
                )
        trt, context, path = self._trt, self._context, self.path

        def enqueue(stream: int) -> None:
            context.set_device_memory(block.data_ptr(), block.nbytes)
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise _failure(trt, path, f"shape {shape} for {name}")
            for name, buffer in buffers.items():
                if not context.set_tensor_address(name, buffer.data_ptr()):
                    raise _failure(trt, path, f"an address for {name}")
            if not context.execute_async_v3(stream):
                raise _failure(trt, path, "a run")

        addresses = (block.data_ptr(), *(buffer.data_ptr() for buffer in buffers.values()))
        return enqueue, (addresses, *shapes.values())

    def _active(self) -> Any:
        check_active(f"engine {self.path.name}", self._engine is not None)
        return self._engine


def compute_capability(device: torch.device) -> str:
    """Give "9.0" and the like; ArrowheadError where there is no GPU to run engines on."""
    if not torch.cuda.is_available():
        raise ArrowheadError(
            "backend tensorrt",
            got="no NVIDIA GPU, or a PyTorch without CUDA",
            expected="the GPU that the engines were built for",
            fix="run on that machine; --backend onnxruntime needs no GPU",
        )
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the one that TensorRT takes."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def current_stream(device: torch.device) -> int:
    """Give the handle of the stream PyTorch launches on."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def record(enqueue: Callable[[int], None], device: torch.device) -> Callable[[], None]:
    """Run once on a side stream, capture a second run, and give the captured graph's replay."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        # The first run after an address or shape changed may allocate and load kernels, which a
        # capture must not. The same inputs are run again, so outputs written twice are the same.
        enqueue(side.cuda_stream)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            enqueue(side.cuda_stream)
    current.wait_stream(side)
    return graph.replay


def _deserialize(trt: TensorRT, runtime: Any, path: Path, metadata: EngineMetadata) -> Any:
    check_bytes(path, metadata)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        trt.logger.clear()
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise _failure(trt, path, "an engine that this machine can load")
    return engine


def _refit(trt: TensorRT, engine: Any, graph: Path) -> None:
    """Give a stripped engine its weights back, from the graph and the weights file it names."""
    refitter = trt.api.Refitter(engine, trt.logger)
    parser = trt.api.OnnxParserRefitter(refitter, trt.logger)
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        missing = refitter.get_missing_weights()[:3]
        raise _failure(trt, graph, f"the weights of a stripped engine ({missing} missing)")


def _check_io(
    trt: TensorRT, engine: Any, path: Path, graph: GraphSpec, metadata: EngineMetadata
) -> None:
    """Hold the engine's tensors against the bundle: names, dtypes, and who is an input."""
    api = trt.api
    shared = set(metadata.shared_weights)
    expected = {(s.name, s.dtype, True) for s in graph.inputs}
    expected |= {(s.name, s.dtype, True) for s in graph.weights if s.name in shared}
    expected |= {(s.name, s.dtype, False) for s in graph.outputs}
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    found = {
        (
            name,
            dtype_name(api, engine.get_tensor_dtype(name)),
            engine.get_tensor_mode(name) == api.TensorIOMode.INPUT,
        )
        for name in names
    }
    if found != expected:
        raise ArrowheadError(
            f"tensors of engine {path}",
            got=sorted(found - expected),
            expected=sorted(expected - found),
            fix="build it again: arrowhead build BUNDLE --backend tensorrt",
        )


def _failure(trt: TensorRT, path: Path, expected: str) -> ArrowheadError:
    return ArrowheadError(
        f"engine {path.name}",
        got=last_error(trt),
        expected=expected,
        fix="build it again on this machine: arrowhead build BUNDLE --backend tensorrt",
    )
