"""Engines of the backend torch-compile: compiled plans behind the protocol of all engines.

Their caches are not bundle.json's: they hold what cached heads add to the output projection, so
each engine declares tensors of its own, and the denoising state owns those as it owns any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from plans.bundle import GraphSpec, TensorSpec
from plans.plan import Plan, cache_flow
from plans.prepared import PreparedBucket
from trt_runtime.engine import CACHE_IN, CACHE_OUT, check_active, check_buffers, check_inactive
from trt_runtime.torch_compiled import CompiledPlan, CompiledStock
from trt_runtime.torch_engine import position_ids

_PARTS = {1: ("joint",), 2: ("text", "image")}


class CompiledModel:
    """What the engines of one transformer share: weights, compiled code, working memory.

    It is there while one of them is active. options: CompiledPlan's or, dense, CompiledStock's.
    """

    def __init__(
        self, transformer: nn.Module, plan: Plan, batch: int, *, dense: bool = False, **options: Any
    ) -> None:
        self.plan, self.dense = plan, dense
        self.device = next(transformer.parameters()).device
        self._transformer, self._batch, self._options = transformer, batch, options
        self._compiled: CompiledPlan | CompiledStock | None = None
        self._users = 0

    def acquire(self) -> None:
        if self._compiled is None and self.dense:
            self._compiled = CompiledStock(self._transformer, **self._options)
        elif self._compiled is None:
            self._compiled = CompiledPlan(
                self._transformer, self.plan, batch=self._batch, own_caches=False, **self._options
            )
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if self._users == 0 and self._compiled is not None:
            self._compiled.close()
            self._compiled = None

    def bind(
        self,
        bucket: int | None,
        caches: Mapping[str, tuple[Tensor, ...]],
        inputs: Mapping[str, Tensor],
        sample: Tensor,
    ) -> Callable[[], None]:
        """Compile and capture a bucket, or with None the stock transformer."""
        compiled = self._compiled
        assert compiled is not None
        if isinstance(compiled, CompiledPlan) and bucket is not None:
            part = compiled.prepared.bucket(bucket, caches)
        else:
            part = PreparedBucket()
        return compiled.bind(part, inputs, sample)

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Give PreparedPlan.cache_shapes; works out the plan's weights for that, once."""
        if self.dense:
            return {}
        assert isinstance(self._compiled, CompiledPlan)
        return self._compiled.prepared.cache_shapes()


class CompiledEngine:
    """One bucket of a compiled plan (or the stock transformer, for `graph.bucket` None).

    inputs and outputs are those of the graph but for the caches, which are there once it is active:
    <group>.text [B, T, C] and <group>.image [B, V, C], or <group>.joint [B, S, C].
    """

    def __init__(self, model: CompiledModel, graph: GraphSpec) -> None:
        self.inputs = tuple(s for s in graph.inputs if not s.name.startswith(CACHE_IN))
        self.outputs = tuple(s for s in graph.outputs if not s.name.startswith(CACHE_OUT))
        self.device = model.device
        self._graph_io = (self.inputs, self.outputs)
        self._model, self._bucket = model, graph.bucket
        self._name = "dense" if graph.bucket is None else f"bucket {graph.bucket}"
        self._groups: dict[str, int] = {}  # by name, with the number of their parts
        self._constants: dict[str, Tensor] = {}
        self._active = False

    def __enter__(self) -> Self:
        check_inactive(f"compiled engine of {self._name}", self._active)
        self._model.acquire()
        self._active = True
        try:
            self._declare_caches()
            self._constants = position_ids(self._model.plan, self.device)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _declare_caches(self) -> None:
        inputs, outputs = self._graph_io
        if self._bucket is not None:
            flow, shapes = cache_flow(self._model.plan), self._model.cache_shapes()
            dtype, rows = outputs[0].dtype, outputs[0].shape[0]  # "B" where a bundle takes a range

            def specs(prefix: str, names: list[str]) -> tuple[TensorSpec, ...]:
                return tuple(
                    TensorSpec(f"{prefix}{name}.{part}", dtype, (rows, *shape[1:]))
                    for name in names
                    for part, shape in zip(_PARTS[len(shapes[name])], shapes[name], strict=True)
                )

            reads = [group.name for group in flow.reads(self._bucket)]
            writes = [group.name for group in flow.writes(self._bucket)]
            self._groups = {name: len(shapes[name]) for name in (*reads, *writes)}
            inputs, outputs = inputs + specs(CACHE_IN, reads), outputs + specs(CACHE_OUT, writes)
        self.inputs, self.outputs = inputs, outputs

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if self._active:
            self._active, self._constants = False, {}
            self._model.release()

    def bind(
        self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Callable[[], None]:
        """Check the buffers, then compile and capture the bucket on them, which runs it."""
        check_active(f"compiled engine of {self._name}", self._active)
        check_buffers(self._name, self.inputs, feeds, self.device)
        check_buffers(self._name, self.outputs, outputs, self.device)
        buffers = {n.removeprefix(CACHE_IN): t for n, t in feeds.items()}
        buffers |= {n.removeprefix(CACHE_OUT): t for n, t in outputs.items()}
        caches = {
            name: tuple(buffers[f"{name}.{part}"] for part in _PARTS[parts])
            for name, parts in self._groups.items()
        }
        inputs = {n: t for n, t in feeds.items() if not n.startswith(CACHE_IN)}
        return self._model.bind(self._bucket, caches, inputs | self._constants, outputs["sample"])

    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.bind(feeds, outputs)()
