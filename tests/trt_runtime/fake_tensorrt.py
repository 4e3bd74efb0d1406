"""A stand-in for TensorRT's runtime objects, which records what is asked of them.

It computes nothing: a real engine needs a GPU. The method names and arguments are those of the
bindings, which test_tensorrt_build.py holds it to.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from plans.bundle import GraphSpec, TensorSpec, WeightSpec

DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT64 INT8")
TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
Strategy = enum.Enum("Strategy", "STATIC USER_MANAGED")
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}


def engine_content(
    graph: GraphSpec, shared: Sequence[WeightSpec] = (), activation_bytes: int = 1000
) -> bytes:
    """What the stand-in takes for a serialised engine."""

    def entry(spec: TensorSpec | WeightSpec, mode: str) -> list[str]:
        return [spec.name, _DTYPES[spec.dtype], mode]

    tensors = [entry(spec, "INPUT") for spec in (*graph.inputs, *shared)]
    tensors += [entry(spec, "OUTPUT") for spec in graph.outputs]
    return json.dumps({"tensors": tensors, "activation_bytes": activation_bytes}).encode()


class Logger:
    def __init__(self) -> None:
        self.errors: list[str] = []
        self.messages: list[str] = []

    def clear(self) -> None:
        self.errors.clear()
        self.messages.clear()


class Context:
    """Records its calls in `calls`; refuses the method named `fails`."""

    def __init__(self, logger: Logger) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails = ""
        self._logger = logger

    def _record(self, name: str, *arguments: Any) -> bool:
        self.calls.append((name, *arguments))
        if name == self.fails:
            self._logger.errors.append(f"{name} is out of order")
        return name != self.fails

    def set_device_memory(self, memory: int, size: int) -> None:
        self._record("set_device_memory", memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._record("set_input_shape", name, shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        return self._record("set_tensor_address", name, memory)

    def execute_async_v3(self, stream_handle: int) -> bool:
        return self._record("execute_async_v3", stream_handle)


class Engine:
    def __init__(self, content: bytes, logger: Logger) -> None:
        data = json.loads(content)
        self._tensors = {name: (dtype, mode) for name, dtype, mode in data["tensors"]}
        self.device_memory_size_v2 = data["activation_bytes"]
        self.num_io_tensors = len(self._tensors)
        self.context = Context(logger)
        self.refitted_from: str | None = None

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._tensors[name][0]]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self._tensors[name][1]]

    def create_execution_context(self, strategy: Strategy) -> Context:
        assert strategy is Strategy.USER_MANAGED
        return self.context


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
        try:
            return Engine(bytes(serialized_engine), self._logger)
        except ValueError:
            self._logger.errors.append("deserializeCudaEngine:\n  no engine")
            return None


class Refitter:
    def __init__(self, engine: Engine, logger: Logger) -> None:
        self.engine = engine

    def refit_cuda_engine(self) -> bool:
        return self.engine.refitted_from is not None

    def get_missing_weights(self) -> list[str]:
        return ["to_q.weight"]


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Logger) -> None:
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        self._refitter.engine.refitted_from = model
        return True


def api() -> SimpleNamespace:
    """Stand in for the module `tensorrt`."""
    return SimpleNamespace(
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=Strategy,
        Runtime=Runtime,
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
    )
