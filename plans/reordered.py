"""Heads of a transformer put in another order, in place, and back.

Rows of Q, K and V and columns of the output projections move together, so the transformer computes
what it did, to rounding. All that move heads of one transformer at a time share one order.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plans.head_order import Order

_PLAIN = (nn.Parameter, Tensor)  # no subclass: quantised, sharded
_MOVED: weakref.WeakKeyDictionary[nn.Module, _MovedHeads] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class HeadLayers:
    """The projections of an attention module that have a part for each head."""

    head_dim: int
    rows: tuple[nn.Linear, ...]  # Q, K, V
    columns: tuple[nn.Linear, ...]  # output projections, whose first input channels are the heads'

    def parts(self) -> list[tuple[nn.Linear, str, int]]:
        """Give layer, parameter and dimension of all that is moved."""
        names = [(layer, name, 0) for layer in self.rows for name in ("weight", "bias")]
        names += [(layer, "weight", 1) for layer in self.columns]
        return [part for part in names if getattr(part[0], part[1]) is not None]


class HeldOrder:
    """One user's hold on the order of a transformer's heads: `orders`, by module.

    The last one to release it has the weights put back bit for bit. A hold that is forgotten
    writes nothing, since it may be collected in the midst of another's step, trace or capture:
    heads then stay as they are, which computes the same, until the next hold.
    """

    def __init__(self, moved: _MovedHeads) -> None:
        self.orders = moved.orders
        self._moved = moved
        moved.users += 1
        self._leave = weakref.finalize(self, moved.leave)
        self._leave.atexit = False

    @property
    def released(self) -> bool:
        return not self._leave.alive

    def release(self) -> None:
        if self._leave() and not self._moved.users:
            self._moved.put_back()


def hold_order(
    transformer: nn.Module, layers: Mapping[str, HeadLayers], wanted: Mapping[str, Order]
) -> HeldOrder:
    """Put heads into the orders wanted; where another user holds the transformer's, take that.

    Modules whose weights are not the process's own memory, or no plain matrices, or lie in memory
    of other parameters too (tied), keep their order. One weight is copied at a time.
    """
    moved = _MOVED.get(transformer)
    if moved is not None and not moved.users:
        moved.put_back()  # what a forgotten hold left
        moved = None
    if moved is None:
        moved = _MovedHeads({name: tuple(range(len(order))) for name, order in wanted.items()})
        shared = _overlapping(transformer)
        _settle(transformer.parameters())
        try:
            for name, order in wanted.items():
                if order != moved.orders[name] and _is_movable(layers[name], shared):
                    moved.move(name, layers[name], order)
        except BaseException:
            moved.put_back()
            raise
        _settle(transformer.parameters())
        _MOVED[transformer] = moved
    return HeldOrder(moved)


def orders_of(transformer: nn.Module) -> Mapping[str, Order]:
    """Give the order of heads of the modules in which it is not their own."""
    moved = _MOVED.get(transformer)
    orders = {} if moved is None else moved.orders
    return {name: order for name, order in orders.items() if order != tuple(range(len(order)))}


@dataclass
class _Part:
    """A parameter that was moved, and the state that it was left in."""

    layer: nn.Linear
    name: str
    dim: int
    head_dim: int
    back: Order
    parameter: Tensor
    version: int

    def put_back(self) -> bool:
        """Undo; if somebody wrote a parameter since, leave it and say so."""
        parameter = getattr(self.layer, self.name)
        if parameter is not self.parameter or _version(parameter) != self.version:
            return False
        _gather(parameter, self.dim, self.back, self.head_dim)
        return True


class _MovedHeads:
    def __init__(self, orders: dict[str, Order]) -> None:
        self.orders = orders
        self.users = 0
        self._parts: list[_Part] = []

    def move(self, name: str, layers: HeadLayers, order: Order) -> None:
        back = tuple(order.index(head) for head in range(len(order)))
        for layer, parameter, dim in layers.parts():
            weight = getattr(layer, parameter)
            _gather(weight, dim, order, layers.head_dim)
            version = _version(weight)
            self._parts.append(_Part(layer, parameter, dim, layers.head_dim, back, weight, version))
        self.orders[name] = order

    def leave(self) -> bool:
        self.users -= 1
        return True

    def put_back(self) -> None:
        """Undo what was done, the last first."""
        self.orders = {}
        parameters = [part.parameter for part in self._parts]
        _settle(parameters)
        written = 0
        while self._parts:
            written += not self._parts.pop().put_back()
        _settle(parameters)
        if written:
            warnings.warn(
                f"{written} attention weights were written while a compiled plan held them, and "
                "are left as they are: change weights before a plan is attached",
                stacklevel=2,
            )


def _settle(parameters: Iterable[Tensor]) -> None:
    """Wait for the GPUs: steps on other streams must be over, and see all weights moved."""
    for device in {parameter.device for parameter in parameters}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _gather(parameter: Tensor, dim: int, order: Order, head_dim: int) -> None:
    index = torch.tensor(order, device=parameter.device)
    with torch.inference_mode():  # parameters may require gradients, or be inference tensors
        part = parameter.detach().narrow(dim, 0, len(order) * head_dim)
        heads = part.unflatten(dim, (len(order), head_dim))
        heads.copy_(heads.index_select(dim, index))


def _version(tensor: Tensor) -> int:
    """Count the writes to a tensor; inference tensors do not."""
    return 0 if tensor.is_inference() else tensor._version


def _is_movable(layers: HeadLayers, shared: set[int]) -> bool:
    for layer, name, _ in layers.parts():
        weight: Any = getattr(layer, name)
        plain = type(layer) is nn.Linear and type(weight) in _PLAIN
        if not plain or not weight.is_contiguous() or weight.data_ptr() in shared:
            return False
        storage = weight.untyped_storage()
        # Not so: a mapped file's, NumPy's, another process's.
        if not storage.resizable() or (weight.device.type == "cpu" and storage.is_shared()):
            return False
    return True


def _overlapping(transformer: nn.Module) -> set[int]:
    """Give the addresses of parameters and buffers that share memory with another."""
    tensors: Sequence[Tensor] = [
        tensor
        for named in (transformer.named_parameters, transformer.named_buffers)
        for _, tensor in named(remove_duplicate=False)
        if type(tensor) in _PLAIN and tensor.numel()
    ]
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.element_size() * (
            1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        ))
        for t in tensors
    )  # fmt: skip
    shared: set[int] = set()
    reaching = (0, 0)  # the span before that ends last
    for span in spans:
        if span[0] < reaching[1]:
            shared |= {span[0], reaching[0]}
        reaching = max(reaching, span, key=lambda s: s[1])
    return shared
