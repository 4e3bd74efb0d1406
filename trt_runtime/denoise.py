"""The state of a denoising run: which step it is, which engine runs it, and the head caches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plans.bundle import Bundle
from plans.errors import ArrowheadError
from plans.plan import Plan
from trt_runtime.engine import CACHE_IN, CACHE_OUT, Engine, allocate
from trt_runtime.step_clock import StepClock

# Relative; a bf16 timestep has 8 bits of mantissa, so neighbours may be equal and none is exact.
_TIMESTEP_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class _Context:
    """Buffers of one cache context; every call of the context reuses them."""

    feeds: dict[str, Tensor]
    caches: dict[str, Tensor]
    sample: Tensor
    runs: dict[tuple[int, int], Callable[[], None]] = field(default_factory=dict)  # bucket, rows
    # Inputs and sample of a number of rows: views are made once, so that no step makes any.
    views: dict[int, tuple[dict[str, Tensor], Tensor]] = field(default_factory=dict)
    step: int = 0
    rows: int = 0  # of the run's calls, as its first call has them; before it, the most

    def view(self, rows: int) -> tuple[dict[str, Tensor], Tensor]:
        if rows not in self.views:
            feeds = {name: buffer[:rows] for name, buffer in self.feeds.items()}
            self.views[rows] = feeds, self.sample[:rows]
        return self.views[rows]

    def poison(self) -> None:
        for cache in self.caches.values():
            cache.fill_(math.nan)


class DenoiseState:
    """Owner of all caches of one pipeline; one request at a time.

    Each cache context ("cond", "uncond", "default") has its own step count and its own caches,
    one buffer per cache that the engines declare (bundle.json's groups, [B, S, Hg, D], or a
    backend's own), allocated at its first call and kept. Where a bundle takes a range of rows,
    buffers are for the most, and a run of fewer uses the first of them.
    poison: fill the caches with NaN at each reset, so that a read before a write shows.
    """

    def __init__(
        self, plan: Plan, bundle: Bundle, engines: Mapping[int, Engine], *, poison: bool = False
    ) -> None:
        self.plan = plan
        self.poison = poison
        self._bundle = bundle
        self._engines = engines
        self._clock = StepClock(engines[plan.schedule[0]].device)
        self._contexts: dict[str, _Context] = {}
        self._timesteps: list[float] = []
        self._schedule: Sequence[int] = ()
        self._any_timestep = False
        self._fall_back = False

    @property
    def started(self) -> bool:
        """Whether set_timesteps was seen, so that a step can be counted."""
        return bool(self._timesteps)

    @property
    def steps(self) -> int:
        return len(self._timesteps)

    @property
    def step_seconds(self) -> list[tuple[int, float]]:
        """(bucket, seconds) of each call, in their order; waits until the last one is done."""
        return self._clock.seconds

    @property
    def buckets_run(self) -> list[int]:
        """The bucket of each call, in their order."""
        return self._clock.buckets

    def forget_times(self) -> None:
        """Forget which calls there were and how long they took."""
        self._clock.clear()

    def prepare(self, name: str) -> None:
        """Allocate and bind all that context `name` needs, so that no step has to.

        For calls of as many rows as there were last, or else of the most that the bundle takes.
        Engines that compile or capture do so here, and run once on what the buffers hold.
        """
        context = self._contexts.get(name) or self._open(name)
        for bucket in sorted(set(self.plan.schedule)):
            if (bucket, context.rows) not in context.runs:
                self._bind(context, bucket, context.rows)
        if self.poison:
            context.poison()

    def step_of(self, name: str) -> int:
        """Count the calls context `name` has made in this run."""
        context = self._contexts.get(name)
        return context.step if context else 0

    def begin(
        self, timesteps: Sequence[float], *, dense: bool = False, fall_back: bool = False
    ) -> None:
        """Start a run over these timesteps.

        dense: every step takes the plan's all-full bucket, whatever its timestep is.
        fall_back: a run that starts in mid-schedule becomes dense instead of an error.
        """
        self.reset()
        self.forget_times()  # kept by reset: pipelines reset at their end
        self._timesteps = [float(t) for t in timesteps]
        self._schedule = self.plan.schedule
        self._any_timestep, self._fall_back = False, fall_back
        if dense:
            self._go_dense()

    def _go_dense(self) -> None:
        self._schedule = (full_bucket(self.plan),) * len(self._timesteps)
        self._any_timestep = True

    def reset(self) -> None:
        """Forget the run: counts, timesteps and (under poison) what the caches hold."""
        self._timesteps, self._schedule = [], ()
        for context in self._contexts.values():
            context.step = 0
            if self.poison:
                context.poison()

    def release(self) -> None:
        """Reset and drop all buffers."""
        self.reset()
        self._contexts = {}

    def run(self, name: str, arguments: Mapping[str, Tensor], *, timestep_scale: float) -> Tensor:
        """Run the next step of context `name`; give the sample, good until its next call.

        arguments: the graph's inputs, caches excepted, of any float dtype and device.
        timestep_scale: what the pipeline multiplied the scheduler's timestep by.
        """
        context = self._contexts.get(name) or self._open(name)
        step = context.step
        if step >= len(self._timesteps):
            raise ArrowheadError(
                "transformer call",
                got=f"call {step + 1} of context {name!r} since set_timesteps",
                expected=f"{len(self._timesteps)} calls, one a step",
                fix="start each picture through the attached pipeline (attach again after a change "
                "of pipe.scheduler); a pipeline with several calls a step must name them by "
                "cache_context",
            )
        if not self._any_timestep:
            self._check_timestep(step, arguments["timestep"], timestep_scale)
        rows = arguments["timestep"].shape[0]
        if step == 0:
            context.rows = rows
        _check_rows(context, rows)
        feeds, sample = context.view(rows)
        for key, buffer in feeds.items():
            buffer.copy_(arguments[key])
        bucket = self._schedule[step]
        run = context.runs.get((bucket, rows)) or self._bind(context, bucket, rows)
        self._clock.start()
        run()
        self._clock.stop(bucket)
        context.step = step + 1
        return sample

    def cache_bytes(self) -> int:
        """Bytes of all caches allocated so far, over all contexts."""
        return sum(
            cache.numel() * cache.element_size()
            for context in self._contexts.values()
            for cache in context.caches.values()
        )

    def _open(self, name: str) -> _Context:
        engine = self._engines[self.plan.schedule[0]]
        batch, device = self._bundle.batch, engine.device
        own = [spec for spec in engine.inputs if not spec.name.startswith(CACHE_IN)]
        sample = [spec for spec in engine.outputs if spec.name == "sample"]
        written = {
            spec.name: spec
            for engine in self._engines.values()
            for spec in engine.outputs
            if spec.name.startswith(CACHE_OUT)
        }
        caches = {
            name.removeprefix(CACHE_OUT): cache
            for name, cache in allocate(list(written.values()), batch, device).items()
        }
        context = _Context(
            allocate(own, batch, device), caches, allocate(sample, batch, device)["sample"],
            rows=batch,
        )  # fmt: skip
        if self.poison:
            context.poison()
        self._contexts[name] = context
        return context

    def _bind(self, context: _Context, bucket: int, rows: int) -> Callable[[], None]:
        engine = self._engines[bucket]
        own, sample = context.view(rows)
        feeds, outputs = dict(own), {"sample": sample}
        for spec in engine.inputs:
            if spec.name.startswith(CACHE_IN):
                feeds[spec.name] = context.caches[spec.name.removeprefix(CACHE_IN)][:rows]
        for spec in engine.outputs:
            if spec.name.startswith(CACHE_OUT):
                outputs[spec.name] = context.caches[spec.name.removeprefix(CACHE_OUT)][:rows]
        context.runs[bucket, rows] = run = engine.bind(feeds, outputs)
        return run

    def _check_timestep(self, step: int, timestep: Tensor, scale: float) -> None:
        # On a GPU reading a value waits for the device, so there only both ends are looked at.
        if timestep.device.type != "cpu" and step not in (0, len(self._timesteps) - 1):
            return
        got = float(timestep.flatten()[0]) / scale
        tolerance = max(_TIMESTEP_TOLERANCE.get(timestep.dtype, 0.0), 1e-5)
        if math.isclose(got, self._timesteps[step], rel_tol=tolerance, abs_tol=1e-3):
            return
        later = [
            i for i, t in enumerate(self._timesteps) if math.isclose(got, t, rel_tol=tolerance)
        ]
        if step == 0 and later and self._fall_back:
            warnings.warn(
                f"the run starts at step {later[0]}: it runs dense, without the plan", stacklevel=5
            )
            self._go_dense()
            return
        if step == 0 and later:
            raise ArrowheadError(
                "start in mid-schedule",
                got=f"timestep {got:g} first, which is step {later[0]}",
                expected=f"timestep {self._timesteps[0]:g}, step 0, which fills the caches",
                fix="use strength=1 (img2img, inpainting), or attach with on_mismatch='dense'",
            )
        raise ArrowheadError(
            f"timestep of step {step}",
            got=f"{got:g}",
            expected=f"{self._timesteps[step]:g}, as the scheduler set it",
            fix="call the transformer once a step and in order, or name the separate calls of a "
            "step by cache_context",
        )


def full_bucket(plan: Plan) -> int:
    """Return the bucket that a run without the plan takes; raise ArrowheadError without one."""
    if plan.full_bucket is None:
        raise ArrowheadError(
            "on_mismatch",
            got="dense, and a plan without a graph that computes every head in full",
            expected="a plan whose first step is full, or on_mismatch='error'",
            fix="pass on_mismatch='error', or search the plan anew with --first-step full",
        )
    return plan.full_bucket


def _check_rows(context: _Context, rows: int) -> None:
    """Refuse another number of rows within a run: its caches hold those of the first call."""
    if rows != context.rows:
        raise ArrowheadError(
            f"rows of step {context.step}",
            got=rows,
            expected=f"{context.rows}, as the run's first call had: the caches hold those",
            fix="draw all steps of a picture with one number of rows; another begins with a run "
            "of its own (scheduler.set_timesteps)",
        )
