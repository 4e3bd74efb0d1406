"""Put an ArrowheadTransformer into a pipeline and hear its scheduler begin each run."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from plans.errors import ArrowheadError
from plans.plan import Plan, Sampler, check_plan
from trt_runtime.bundles import TORCH_BACKENDS, load_transformer
from trt_runtime.denoise import full_bucket
from trt_runtime.live import spec_of
from trt_runtime.transformer import ArrowheadTransformer, refuse_lora

ON_MISMATCH = ("error", "dense")


def attach(
    pipe: Any,
    source: ArrowheadTransformer | Path | str | None = None,
    *,
    plan: Plan | Path | str | None = None,
    backend: str | None = None,
    on_mismatch: str = "error",
    **options: Any,
) -> ArrowheadTransformer:
    """Put a bundle in the place of `pipe.transformer`; `detach(pipe)` undoes it.

    source: a bundle folder, or a transformer that load_transformer made. plan: instead of it, a
    plan or its file, run on the pipeline's own transformer, which is left where it is: no bundle is
    needed. backend and options go to load_transformer. on_mismatch: what a run with another
    sampler, step count, sigmas or start does: "error" refuses it, "dense" warns once and computes
    every head in full, for which the plan must have a bucket that does.
    """
    if on_mismatch not in ON_MISMATCH:
        raise ArrowheadError(
            "on_mismatch", got=on_mismatch, expected=f"one of {ON_MISMATCH}", fix="pass one of them"
        )
    if isinstance(getattr(pipe, "transformer", None), ArrowheadTransformer):
        detach(pipe)
    before = getattr(pipe, "transformer", None)
    loaded = not isinstance(source, ArrowheadTransformer)
    if isinstance(source, ArrowheadTransformer):
        transformer = source
    else:
        if before is not None and (plan is not None or backend in TORCH_BACKENDS):
            options.setdefault("transformer", before)
        transformer = load_transformer(source, plan=plan, backend=backend, **options)
    try:
        if on_mismatch == "dense":
            full_bucket(transformer.plan)
        if before is not None:
            _check_replaced(transformer.plan, before, pipe)
    except BaseException:
        if loaded:
            transformer.close()
        raise
    transformer.on_mismatch = on_mismatch
    undo = _put(pipe, transformer)

    def undo_and_close() -> None:
        undo()
        if loaded:
            transformer.close()

    transformer.undo_attach = undo_and_close
    return transformer


def detach(pipe: Any) -> nn.Module | None:
    """Give the pipeline its own transformer back, and return that (None if it had none)."""
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, ArrowheadTransformer) or transformer.undo_attach is None:
        raise ArrowheadError(
            "detach",
            got=f"a pipeline with a {type(transformer).__name__}",
            expected="a pipeline that trt_runtime.attach changed",
            fix="call detach once for each attach",
        )
    transformer.undo_attach()
    transformer.undo_attach = None
    return pipe.transformer


def _put(pipe: Any, transformer: ArrowheadTransformer) -> Any:
    """Swap the transformer, hook the scheduler, refuse LoRA; return what undoes all three."""
    before, scheduler = pipe.transformer, pipe.scheduler
    own = scheduler.set_timesteps

    @functools.wraps(own)  # pipelines ask for the signature
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        transformer.reset()
        result = own(*args, **kwargs)
        begin_run(transformer, pipe, scheduler)
        return result

    defaults = {
        name: getattr(pipe, name)
        for name in ("default_sample_size", "patch_size")
        if hasattr(pipe, name)
    }
    scheduler.set_timesteps = set_timesteps
    pipe.load_lora_weights = refuse_lora
    pipe.transformer = transformer
    plan = transformer.plan
    if plan.height == plan.width and "default_sample_size" in defaults:
        pipe.default_sample_size = plan.height // plan.vae_scale_factor
    if "patch_size" in defaults:  # a pipeline loaded without a transformer guessed it
        pipe.patch_size = transformer.config.patch_size

    def undo() -> None:
        transformer.reset()
        pipe.transformer = before
        del scheduler.set_timesteps, pipe.load_lora_weights
        for name, value in defaults.items():
            setattr(pipe, name, value)

    return undo


def begin_run(transformer: ArrowheadTransformer, pipe: Any, scheduler: Any) -> None:
    """Hold the scheduler's new timesteps against the plan and start counting steps."""
    timesteps = scheduler.timesteps.tolist()
    fall_back = transformer.on_mismatch == "dense"
    try:
        check_scheduler(transformer.plan, pipe, scheduler)
    except ArrowheadError as error:
        if not fall_back:
            raise
        warnings.warn(f"{error} -- this run computes every head in full", stacklevel=4)
        transformer.state.begin(timesteps, dense=True)
        return
    transformer.state.begin(timesteps, fall_back=fall_back)


def check_scheduler(plan: Plan, pipe: Any, scheduler: Any) -> None:
    """Raise ArrowheadError where the scheduler's timesteps are not those of the plan."""
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1:
        raise ArrowheadError(
            f"scheduler {name}",
            got=f"{scheduler.order} transformer calls a step",
            expected="one, so that the call count is the step",
            fix=f"use {plan.sampler.scheduler}, as the plan does",
        )
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        raise ArrowheadError(
            f"scheduler {name}",
            got="no sigmas",
            expected="a flow-matching scheduler",
            fix=f"use {plan.sampler.scheduler}, as the plan does",
        )
    steps = len(scheduler.timesteps)
    cfg = plan.sampler.cfg
    # SD3 decides by guidance_scale whether a call has two rows a picture; FLUX by calling twice.
    if plan.model.architecture == "SD3Transformer2DModel" and hasattr(pipe, "_guidance_scale"):
        cfg = bool(pipe.do_classifier_free_guidance)
    guidance = getattr(pipe, "_guidance_scale", plan.sampler.guidance_scale)
    sampler = Sampler(name, steps, tuple(sigmas.tolist()[:steps]), cfg, guidance)
    check_plan(plan, sampler=sampler)


def _check_replaced(plan: Plan, transformer: Any, pipe: Any) -> None:
    if getattr(transformer, "peft_config", None):
        refuse_lora()
    scale = getattr(pipe, "vae_scale_factor", None)
    check_plan(plan, spec_of(plan, type(transformer).__name__, transformer.config, scale))
