"""A plan on a plain diffusers pipeline, without a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from plans import sdpa as _register_sdpa  # noqa: F401  (for runs on CUDA)
from plans.denoising import check_pipeline
from plans.errors import ArrowheadError
from plans.models import AttentionModule, model_spec
from plans.plan import CacheFlow, Plan, Sampler, check_plan
from plans.processors import BucketHeads, install


class PlanHeads:
    """Strategy that runs each step's bucket and keeps the caches between steps.

    caches: "<module>.<group>" -> [B, S, Hg, D], on the device of the activations.
    """

    def __init__(self, plan: Plan, device: Any = "cpu", flow: CacheFlow | None = None) -> None:
        self.caches: dict[str, Tensor] = {}
        self._schedule = plan.schedule
        self._buckets = [BucketHeads(plan, b, device, flow) for b in range(len(plan.buckets))]
        for heads in self._buckets:
            # One dictionary is enough: no bucket reads a group that it writes.
            heads.cache_in = heads.cache_out = self.caches
        self._now = self._buckets[plan.schedule[0]]

    def begin_step(self, step: int) -> None:
        """Take the bucket of `step`; step 0 drops what the last pictures left in the caches."""
        if step == 0:
            self.caches.clear()
        self._now = self._buckets[self._schedule[step]]

    def computed_heads(self, module: AttentionModule) -> tuple[int, ...]:
        return self._now.computed_heads(module)

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        return self._now.attend(module, q, k, v)


@contextmanager
def run_plan(pipe: Any, plan: Plan, flow: CacheFlow | None = None) -> Iterator[PlanHeads]:
    """Make every call of the pipeline inside the `with` follow the plan.

    The caches live on the device and are dropped at the first step of each call. Raises
    ArrowheadError where the plan does not fit the model and, at a call's first step, its sampler.
    flow: who writes which cache, cache_flow(plan) by default; `every_write` where something else
    may leave blocks out.
    """
    check_pipeline(pipe)
    transformer = pipe.transformer
    config = {**transformer.config, "_class_name": type(transformer).__name__}
    spec = model_spec(
        config, height=plan.height, width=plan.width, vae_scale_factor=pipe.vae_scale_factor,
        text_tokens=plan.text_tokens, block=plan.block,
    )  # fmt: skip
    check_plan(plan, spec)
    heads = PlanHeads(plan, transformer.device, flow)
    following = 0

    def before(*_: Any) -> None:
        nonlocal following
        # The scheduler's own count: None until the first step of a pipeline call is done.
        index = pipe.scheduler.step_index
        step = index or 0
        if index is None:
            _check_sampler(pipe, plan)
        elif step != following:
            raise _out_of_order(pipe, step, following)
        heads.begin_step(step)
        following = step + 1

    undo = install(transformer, plan.modules, heads)
    handle = transformer.register_forward_pre_hook(before)
    try:
        yield heads
    finally:
        handle.remove()
        undo()
        heads.caches.clear()


def _check_sampler(pipe: Any, plan: Plan) -> None:
    scheduler = pipe.scheduler
    steps = len(scheduler.timesteps)
    sigmas = tuple(scheduler.sigmas.tolist()[:steps])
    cfg = getattr(pipe, "do_classifier_free_guidance", plan.sampler.cfg)
    scale = getattr(pipe, "guidance_scale", plan.sampler.guidance_scale)
    check_plan(plan, sampler=Sampler(type(scheduler).__name__, steps, sigmas, bool(cfg), scale))


def _out_of_order(pipe: Any, step: int, expected: int) -> ArrowheadError:
    return ArrowheadError(
        f"transformer call of {type(pipe).__name__}",
        got=f"a call at step {step}",
        expected=f"step {expected}: one call a step, in order from step 0",
        fix="use FlowMatchEulerDiscreteScheduler, no true CFG (FLUX with a negative prompt), no "
        "skipped layers, and start at strength 1",
    )
