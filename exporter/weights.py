"""The one weights file of a bundle: every tensor once, however many graphs name it."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporter.passes import weight_of
from plans.bundle import WeightSpec

# Runtimes map the file: ONNX Runtime needs a mapped tensor to start on a page.
_ALIGNMENT = 4096

# Smaller constants stay in the .onnx file: shapes, indices, biases of tiny layers.
_INLINE_BYTES = 1024

_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
}


class WeightsFile:
    """Appends tensors to a file as graphs name them, one at a time.

    A model tensor is known by where it lies in memory, so rows of it are a range of its bytes;
    other constants are known by content. Raises OSError when the disk is full.
    """

    def __init__(
        self,
        path: Path,
        model_tensors: Iterable[Tensor],
        progress: Callable[[int], None] = lambda written_bytes: None,
    ) -> None:
        self.path = path
        self.size = 0
        bases = {tensor.data_ptr(): tensor.detach() for tensor in model_tensors}
        self._starts = sorted(bases)
        self._bases = bases
        self._offsets: dict[int | str, int] = {}
        self._progress = progress
        self._digest = hashlib.sha256()
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def externalise(self, model: ir.Model) -> tuple[WeightSpec, ...]:
        """Move a model's initializers to the file; list them in order of name."""
        specs = []
        for name, value in sorted(model.graph.initializers.items()):
            tensor = value.const_value
            assert tensor is not None and value.dtype is not None
            if tensor.nbytes < _INLINE_BYTES or value.dtype not in _DTYPES:
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
                continue
            weight = weight_of(value)
            offset = self._place_model_tensor(weight) if weight is not None else None
            if offset is None:
                offset = self._place_constant(tensor.tobytes())
            shape = tuple(tensor.shape.numpy())
            nbytes = tensor.nbytes
            specs.append(WeightSpec(name, offset, nbytes, _DTYPES[value.dtype], shape))
            value.const_value = ir.ExternalTensor(
                self.path.name,
                offset,
                nbytes,
                value.dtype,
                shape=ir.Shape(shape),
                name=name,
                base_dir=self.path.parent,
            )
        return tuple(specs)

    def _place_model_tensor(self, tensor: Tensor) -> int | None:
        """Offset of a model tensor or rows of one; None if it is not of the model."""
        index = bisect_right(self._starts, tensor.data_ptr()) - 1
        if index < 0 or not tensor.is_contiguous():
            return None
        base = self._bases[self._starts[index]]
        inside = tensor.data_ptr() - base.data_ptr()
        if inside + tensor.nbytes > base.nbytes:
            return None
        if base.data_ptr() not in self._offsets:
            flat = base.reshape(-1).view(torch.uint8).numpy()
            self._offsets[base.data_ptr()] = self._append(flat)
        return self._offsets[base.data_ptr()] + inside

    def _place_constant(self, data: bytes) -> int:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._offsets:
            self._offsets[key] = self._append(np.frombuffer(data, np.uint8))
        return self._offsets[key]

    def _append(self, data: np.ndarray) -> int:
        padding = bytes(-self.size % _ALIGNMENT)
        for part in (padding, data.data):
            self._file.write(part)
            self._digest.update(part)
            self.size += len(part)
        self._progress(self.size)
        return self.size - data.nbytes
