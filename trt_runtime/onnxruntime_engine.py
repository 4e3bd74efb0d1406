"""Bucket graphs on ONNX Runtime, on a CPU, or on CUDA where that provider is installed.

On CUDA weights and buffers are PyTorch's, and a run is launched without waiting for the device
(trt_runtime.onnxruntime_cuda).

The operators run by their function bodies, or by kernels of their own where those are built
(trt_runtime.onnxruntime_operators).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from plans.bundle import Bundle, GraphSpec, WeightSpec
from plans.errors import ArrowheadError
from trt_runtime import onnxruntime_cuda as cuda
from trt_runtime.device_weights import DeviceWeights
from trt_runtime.engine import DTYPES, check_active, check_buffers, check_inactive
from trt_runtime.onnxruntime_operators import operators_for, register_operators

# TensorProto.DataType numbers: ONNX Runtime takes these where NumPy has no type (bfloat16).
_ONNX_TYPES = {
    torch.float32: 1,
    torch.int64: 7,
    torch.float16: 10,
    torch.bfloat16: 16,
}
_NUMPY_TYPES = {
    "float32": (np.float32, 1),
    "float16": (np.float16, 10),
    "bfloat16": (np.uint16, 16),
    "int64": (np.int64, 7),
}


WEIGHTS = ("shared", "embedded")


@dataclass(frozen=True)
class SessionSettings:
    """What all sessions of a bundle, the dense one included, have in common.

    threads: of one operator; 0 leaves it to ONNX Runtime (one per core).
    weights: "shared" lets all sessions read one copy; "embedded" lets each keep its own, packed
    for the processor: some percent faster, and the weights' size in memory for each bucket.
    profile: folder for ONNX Runtime's own per-operator traces.
    """

    threads: int = 0
    device: str = "cpu"
    weights: str = "shared"
    profile: Path | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ArrowheadError(
                "weights", got=self.weights, expected=f"one of {WEIGHTS}", fix="pass one of them"
            )


@cache
def runtime() -> Any:
    """Import ONNX Runtime; ArrowheadError says what to install."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ArrowheadError(
            "backend onnxruntime",
            got=f"no module {error.name}",
            expected="ONNX Runtime 1.22 or newer",
            fix="pip install 'arrowhead[onnxruntime]' (or [onnxruntime-gpu], never both)",
        ) from error
    return onnxruntime


@cache
def _share_arena(ort: Any) -> None:
    """Let all sessions of the process take activations from one arena: only one runs at a time."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, None)


class SharedWeights:
    """One copy of the bundle's weights, seen by every session as OrtValues.

    On a CPU it is a memory map of the file, on CUDA memory of PyTorch's.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path = path
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self._on_device = None if device == "cpu" else DeviceWeights(path, device)
        self._values: dict[tuple[int, str, tuple[int, ...]], Any] = {}

    def value(self, weight: WeightSpec) -> Any:
        """Give the OrtValue over one initializer's bytes; the map must outlive the session."""
        key = (weight.offset, weight.dtype, tuple(weight.shape))
        if key not in self._values:
            self._values[key] = self._value(weight)
        return self._values[key]

    def _value(self, weight: WeightSpec) -> Any:
        OrtValue = runtime().OrtValue
        if self._on_device is not None:
            cuda.check_dlpack(OrtValue)
            flat = self._on_device.bytes_of(weight).view(DTYPES[weight.dtype])
            return OrtValue.from_dlpack(flat.view(weight.shape))
        numpy_type, onnx_type = _NUMPY_TYPES[weight.dtype]
        mapped = self._bytes[weight.offset : weight.offset + weight.nbytes]
        array = mapped.view(numpy_type).reshape(weight.shape)
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx_type)


class OnnxRuntimeEngine:
    """One ONNX graph of a bundle as an ONNX Runtime session."""

    def __init__(
        self,
        folder: Path,
        graph: GraphSpec,
        weights: SharedWeights,
        settings: SessionSettings | None = None,
    ) -> None:
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self.settings = settings or SessionSettings()
        self.device = torch.device(self.settings.device)
        self._path = folder / graph.file
        self._graph = graph
        self._weights = weights
        self._session: Any = None

    def __enter__(self) -> Self:
        check_inactive(f"engine {self._path.name}", self._session is not None)
        ort = runtime()
        provider: Any = check_provider(ort, self.settings.device)
        if self.device.type == "cuda":
            self.device = cuda.check_cuda(self.settings.device)
            provider = (provider, cuda.provider_options(self.device))
            # A session writes to the common arena while it is made: no run may still be there.
            cuda.side_stream(self.device).synchronize()
        options = self._options(ort)
        try:
            self._session = ort.InferenceSession(
                str(self._path), options, providers=[provider], enable_fallback=False
            )
        except Exception as error:  # ONNX Runtime has no common base for its exceptions
            raise _explain(self._path, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._session = None

    def _options(self, ort: Any) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # warnings about unused initializers say nothing to a user
        options.intra_op_num_threads = self.settings.threads
        # Buckets take turns on the same cores, each with threads of its own, and PyTorch between
        # them: those that went on spinning for work after a run would keep the next from a core.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.settings.profile is not None:
            options.enable_profiling = True
            prefix = self.settings.profile / self._path.stem
            options.profile_file_prefix = str(prefix)
        library = operators_for(self._graph, self.settings.device)
        if library is not None:
            register_operators(options, library)
        if self.device.type == "cuda":
            cuda.share_device_arena(ort, self.device.index)
            options.add_session_config_entry(*cuda.NO_FALLBACK)
        else:
            _share_arena(ort)
        options.add_session_config_entry("session.use_env_allocators", "1")
        if self.settings.weights == "shared":
            # Packing would give each session its own copy of every matrix again.
            options.add_session_config_entry("session.disable_prepacking", "1")
            for weight in self._graph.weights:
                # Integers are shapes and indices, which the CUDA provider may want on the host.
                if self.device.type == "cpu" or weight.dtype != "int64":
                    options.add_initializer(weight.name, self._weights.value(weight))
        return options

    def bind(
        self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Callable[[], None]:
        session = self._active()
        check_buffers(self._path.name, self.inputs, feeds, self.device)
        check_buffers(self._path.name, self.outputs, outputs, self.device)
        # Kept in the closure: the binding holds bare pointers, so the buffers must stay alive.
        kept = {**feeds, **outputs}
        binding = session.io_binding()
        for name, buffer in feeds.items():
            binding.bind_input(name, *_place(buffer))
        for name, buffer in outputs.items():
            binding.bind_output(name, *_place(buffer))

        if self.device.type == "cpu":

            def run() -> None:
                if kept:
                    session.run_with_iobinding(binding)

            return run
        device, options = self.device, cuda.asynchronous(runtime())

        def launch() -> None:
            if kept:
                session.run_with_iobinding(binding, options)

        return lambda: cuda.in_turn(launch, device)

    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.bind(feeds, outputs)()

    def end_profile(self) -> dict[str, float]:
        """Close the trace; give seconds per operator type, summed over the runs so far."""
        path = Path(self._active().end_profiling())
        seconds: dict[str, float] = {}
        for event in json.loads(path.read_text()):
            kind = event.get("args", {}).get("op_name")
            if event.get("cat") == "Node" and kind and event["name"].endswith("_kernel_time"):
                seconds[kind] = seconds.get(kind, 0.0) + event["dur"] / 1e6
        return seconds

    def _active(self) -> Any:
        check_active(f"engine {self._path.name}", self._session is not None)
        return self._session


def open_weights(bundle: Bundle, folder: Path, device: str = "cpu") -> SharedWeights:
    """Map the bundle's weights file once, for all of its sessions."""
    return SharedWeights(folder / bundle.weights_file, device)


def _place(buffer: Tensor) -> tuple[str, int, int, list[int], int]:
    index = buffer.device.index or 0
    kind = _ONNX_TYPES[buffer.dtype]
    return buffer.device.type, index, kind, list(buffer.shape), buffer.data_ptr()


def check_provider(ort: Any, device: str) -> str:
    """Give the name of the device's provider; ArrowheadError where this ONNX Runtime has none."""
    available = ort.get_available_providers()
    wanted = cuda.PROVIDER if device.startswith("cuda") else "CPUExecutionProvider"
    if wanted not in available:
        raise ArrowheadError(
            f"device {device} on backend onnxruntime",
            got=f"the providers {available}",
            expected=wanted,
            fix="pip uninstall onnxruntime, then pip install 'arrowhead[onnxruntime-gpu]'",
        )
    return wanted


def _explain(path: Path, error: Exception) -> ArrowheadError:
    """Turn what ONNX Runtime says of a graph it cannot load into what a user can do about it."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    lower = text.lower()
    again = "export the bundle again: arrowhead export --plan PLAN --output FOLDER"
    if "fallback to cpu ep" in lower:
        expected = "a provider with kernels on the device for every node, in the graph's dtype"
        # Function bodies of a graph for a range of rows compute shapes, and that on the CPU.
        fix = "build the operators' kernels (make plugins), or update ONNX Runtime (arrowhead "
        fix += f"doctor shows both), or {again} --dtype fp16 and one --batch, not a range"
    elif "cudaexecutionprovider" in lower or "cuda failure" in lower:
        expected = "a CUDA provider that this machine's driver and libraries can run"
        fix = "install the CUDA and cuDNN that onnxruntime-gpu names (arrowhead doctor shows both)"
    elif "is not a registered function/op" in lower or "no opset import" in lower:
        expected = "operators this ONNX Runtime knows"
        fix = f"{again}; if it says the same, update ONNX Runtime (arrowhead doctor shows yours)"
    elif "protobuf" in lower or "invalidprotobuf" in type(error).__name__.lower():
        expected, fix = "a readable ONNX file", f"the file is damaged: {again}"
    elif "not_implemented" in lower or "notimplemented" in type(error).__name__.lower():
        expected = "operators this provider has kernels for in the graph's dtype"
        fix = "on a CPU export with --dtype fp32 or fp16: its provider multiplies no bf16"
    else:
        expected, fix = "a graph ONNX Runtime can load", again
    return ArrowheadError(f"graph {path.name}", got=text, expected=expected, fix=fix)
