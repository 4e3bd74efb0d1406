"""The one thing every backend is to the runtime: a graph, ready to run on the caller's buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from plans.bundle import TensorSpec
from plans.errors import ArrowheadError

CACHE_IN = "cache_in."
CACHE_OUT = "cache_out."
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


class Engine(Protocol):
    """One graph on one device; usable between `__enter__` and `__exit__`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: torch.device

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def bind(
        self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Callable[[], None]:
        """Check the buffers once; return a call that runs the graph on whatever they then hold.

        An output buffer may also be a feed of another engine, never of this one. Raises
        ArrowheadError naming the tensor whose name, dtype, shape or device does not fit.
        """

    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Bind and run once."""


def shape_of(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """Put `batch` in the place of the one dynamic dimension."""
    return tuple(batch if isinstance(dim, str) else dim for dim in spec.shape)


def allocate(
    specs: Sequence[TensorSpec], batch: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Make one zeroed buffer per tensor."""
    return {
        spec.name: torch.zeros(shape_of(spec, batch), dtype=DTYPES[spec.dtype], device=device)
        for spec in specs
    }


def check_inactive(subject: str, active: bool) -> None:
    """Refuse a second activation; every engine's `__enter__` begins so."""
    if active:
        raise ArrowheadError(
            subject,
            got="a second activation",
            expected="one `with` at a time",
            fix="leave the first `with` block, or make another engine",
        )


def check_active(subject: str, active: bool) -> None:
    """Refuse a call of an engine that is not active."""
    if not active:
        raise ArrowheadError(
            subject,
            got="a call outside its `with` block",
            expected="an active engine",
            fix="use `with engine:` around it, or load the transformer anew",
        )


def check_buffers(
    graph: str,
    specs: Sequence[TensorSpec],
    buffers: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Hold buffers against the graph's tensors; ArrowheadError names the first that does not fit.

    Extra buffers are refused too: a cache handed to a graph that does not read it is a mistake.
    """
    names = [spec.name for spec in specs]
    if set(names) != set(buffers):
        raise ArrowheadError(
            f"tensors of {graph}",
            got=f"{sorted(set(buffers) - set(names))} too many, {sorted(set(names) - set(buffers))}"
            " missing",
            expected=f"{names}",
            fix="bind the tensors bundle.json lists for this graph",
        )
    batch: int | None = None
    for spec in specs:
        buffer = buffers[spec.name]
        if batch is None and spec.shape and isinstance(spec.shape[0], str):
            batch = buffer.shape[0]
        expected = (DTYPES[spec.dtype], shape_of(spec, batch or 0), device.type)
        got = (buffer.dtype, tuple(buffer.shape), buffer.device.type)
        if got != expected or not buffer.is_contiguous():
            order = "" if buffer.is_contiguous() else ", not contiguous"
            raise ArrowheadError(
                f"tensor {spec.name} of {graph}",
                got=f"{got[0]} {list(got[1])} on {got[2]}{order}",
                expected=f"{expected[0]} {list(expected[1])} on {expected[2]}",
                fix="allocate the buffer with trt_runtime.engine.allocate",
            )
