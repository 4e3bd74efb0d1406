"""What the bench of steps asks of a plan on a backend, and PyTorch's own backends as that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from plans.plan import Plan
from trt_runtime.step_memory import weights_of_buckets
from trt_runtime.step_runners import Runner
from trt_runtime.torch_compiled import CompiledPlan


class PlannedSteps(Protocol):
    """A plan's steps on one backend, on the bench's weights and inputs, with caches of random."""

    plan: Plan
    attention: str
    open_seconds: float  # to make what is run, before its first run
    measured: dict[str, Any]  # what else the row tells

    def runner(self, name: str, bucket: int) -> Runner: ...

    def run_step(self, step: int) -> None:
        """Run one step of the schedule."""

    def cache_bytes(self) -> int: ...

    def weights(self, one: int, one_on_device: int, prepared: int) -> dict[str, Any]:
        """Give weights_of_buckets; prepared: what the device had less once the plan was ready."""

    def close(self) -> None: ...


class CompiledSteps:
    """A plan in PyTorch, uncompiled or under torch.compile."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        inputs: Mapping[str, Tensor],
        rows: int,
        options: Mapping[str, Any],
    ) -> None:
        self.plan = plan
        self.open_seconds = 0.0  # compiled at the first run
        self.measured: dict[str, Any] = {}
        self._inputs = inputs
        self._compiled = CompiledPlan(model, plan, batch=rows, **options)
        self.attention = self._compiled.attention
        for parts in self._compiled.prepared.caches.values():
            for part in parts:
                part.normal_()

    def runner(self, name: str, bucket: int) -> Runner:
        compiled = self._compiled

        def uncaptured() -> Tensor:
            compiled.prepared.use(bucket)
            with compiled.installed(compiled.prepared.buckets[bucket]):
                return compiled.call(self._inputs)

        return Runner(name, lambda: compiled.run(bucket, self._inputs), uncaptured)

    def run_step(self, step: int) -> None:
        if step == 0:
            self._compiled.prepared.reset()
        self._compiled.step(step, self._inputs)

    def cache_bytes(self) -> int:
        return self._compiled.prepared.cache_bytes()

    def weights(self, one: int, one_on_device: int, prepared: int) -> dict[str, Any]:
        copied = self._compiled.prepared.weight_bytes()
        return weights_of_buckets(one, one_on_device, copied, self.cache_bytes(), prepared)

    def close(self) -> None:
        self._compiled.close()
