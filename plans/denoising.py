"""Calling a diffusers pipeline for the search: what it is, and one run with steps counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from plans.errors import ArrowheadError
from plans.models import (
    AttentionModule,
    complete_config,
    config_fingerprint,
    model_spec,
    weights_fingerprint,
)
from plans.plan import Bucket, ModelRef, Plan, Sampler, dense_plan
from plans.processors import HeadStrategy, install

PIPELINES = ("StableDiffusion3Pipeline", "FluxPipeline")

Prompts = Sequence[str] | Mapping[str, Tensor]


class StepStrategy(HeadStrategy, Protocol):
    """A strategy that is told which step begins."""

    def begin_step(self, step: int) -> None: ...


@dataclass(frozen=True)
class Denoising:
    """How the pipeline is called; prompts may be precomputed embeddings by keyword."""

    prompts: Prompts
    steps: int
    height: int
    width: int
    guidance_scale: float
    max_sequence_length: int | None
    seed: int

    @property
    def pictures(self) -> int:
        if isinstance(self.prompts, Mapping):
            return self.prompts["prompt_embeds"].shape[0]
        return len(self.prompts)

    def groups(self, pictures: int) -> Iterator[Denoising]:
        """Split into runs of so many pictures at most, each with the noise it has here."""
        for first in range(0, self.pictures, pictures):
            part = slice(first, first + pictures)
            prompts = self.prompts
            if isinstance(prompts, Mapping):
                prompts = {
                    name: value[part] if isinstance(value, Tensor) else value
                    for name, value in prompts.items()
                }
            else:
                prompts = list(prompts)[part]
            yield replace(self, prompts=prompts, seed=self.seed + first)

    def arguments(self) -> dict[str, Any]:
        prompts = self.prompts
        generators = [
            torch.Generator("cpu").manual_seed(self.seed + i) for i in range(self.pictures)
        ]
        arguments: dict[str, Any] = {
            **(prompts if isinstance(prompts, Mapping) else {"prompt": list(prompts)}),
            "num_inference_steps": self.steps,
            "height": self.height,
            "width": self.width,
            "guidance_scale": self.guidance_scale,
            "generator": generators,
            "output_type": "latent",
        }
        if self.max_sequence_length is not None:
            arguments["max_sequence_length"] = self.max_sequence_length
        return arguments


def dense_plan_of(
    pipe: Any, settings: Denoising, block: int, source: Path | str | None, revision: str | None
) -> Plan:
    """Return the all-full plan of a pipeline as called: model, token layout and sampler."""
    check_pipeline(pipe)
    facts = _probe(pipe, settings)
    config = complete_config({**pipe.transformer.config, "_class_name": _class(pipe.transformer)})
    spec = model_spec(
        config,
        height=settings.height,
        width=settings.width,
        vae_scale_factor=pipe.vae_scale_factor,
        text_tokens=facts.text_tokens,
        block=block,
    )
    folder = Path(source) if source is not None and Path(source).is_dir() else None
    weights = None
    if folder is not None:
        inner = folder / "transformer"
        weights = weights_fingerprint(inner if inner.is_dir() else folder)
    del config["_class_name"]
    where = None if source is None else str(source)
    plan = Plan(
        model=ModelRef(
            spec.architecture,
            config_fingerprint(spec.config),
            source=where if folder is None else str(folder.resolve()),
            revision=revision,
            weights_sha256=weights,
            config=config,
        ),
        height=settings.height,
        width=settings.width,
        vae_scale_factor=pipe.vae_scale_factor,
        text_tokens=facts.text_tokens,
        block=block,
        modules=spec.modules,
        sampler=Sampler(
            _class(pipe.scheduler),
            settings.steps,
            facts.sigmas,
            facts.rows == 2 * settings.pictures,
            settings.guidance_scale,
        ),
        buckets=(Bucket({}),),
        schedule=(0,) * settings.steps,
    )
    return dense_plan(plan)


def denoise(
    pipe: Any,
    settings: Denoising,
    modules: Sequence[AttentionModule],
    strategy: StepStrategy,
    step_done: Callable[[int], None],
) -> None:
    """Run the pipeline once to its latents with the strategy in its attention modules."""
    calls = 0

    def before(module: Any, args: Any, kwargs: Any) -> None:
        # The scheduler's own count, where it has one, tells a second call in the same step.
        index = getattr(pipe.scheduler, "step_index", calls) or 0
        if index != calls or calls == settings.steps:
            raise _calls_per_step(pipe, "more than one")
        strategy.begin_step(calls)

    def after(module: Any, args: Any, output: Any) -> None:
        nonlocal calls
        step_done(calls)
        calls += 1

    undo = install(pipe.transformer, modules, strategy)
    handles = [
        pipe.transformer.register_forward_pre_hook(before, with_kwargs=True),
        pipe.transformer.register_forward_hook(after),
    ]
    try:
        with _no_progress_bar(pipe):
            latents = pipe(**settings.arguments(), return_dict=False)[0]
    finally:
        for handle in handles:
            handle.remove()
        undo()
    if calls != settings.steps:
        raise _calls_per_step(pipe, f"{calls} in {settings.steps} steps")
    if not torch.isfinite(latents).all():
        raise ArrowheadError(
            f"latents of {_class(pipe)}",
            got=f"values that are not finite in {pipe.transformer.dtype}",
            expected="finite latents",
            fix="search in bfloat16 or float32",
        )


@dataclass(frozen=True)
class _Facts:
    rows: int
    text_tokens: int
    sigmas: tuple[float, ...]


class _ProbedError(Exception):
    """Ends a probe run at its first transformer call."""


def _probe(pipe: Any, settings: Denoising) -> _Facts:
    """Learn what the pipeline passes to the transformer, without calling the transformer."""
    found: dict[str, Tensor] = {}

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        found.update(text=kwargs["encoder_hidden_states"], sigmas=pipe.scheduler.sigmas)
        raise _ProbedError

    handle = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with _no_progress_bar(pipe), contextlib.suppress(_ProbedError):
            pipe(**settings.arguments())
    finally:
        handle.remove()
    timesteps = len(pipe.scheduler.timesteps)
    if timesteps != settings.steps:
        raise _calls_per_step(pipe, f"{timesteps} in {settings.steps} steps")
    sigmas = tuple(round(float(sigma), 9) for sigma in found["sigmas"][: settings.steps])
    return _Facts(found["text"].shape[0], found["text"].shape[1], sigmas)


def check_pipeline(pipe: Any) -> None:
    """Raise ArrowheadError unless the pipeline is one the search can call."""
    if not any(cls.__name__ in PIPELINES for cls in type(pipe).__mro__):
        raise ArrowheadError(
            "pipeline",
            got=_class(pipe),
            expected=f"one of {', '.join(PIPELINES)}",
            fix="load the checkpoint with the text-to-image pipeline of its model",
        )
    if not hasattr(pipe.scheduler, "set_timesteps") or not hasattr(pipe.scheduler, "sigmas"):
        raise ArrowheadError(
            "scheduler",
            got=_class(pipe.scheduler),
            expected="a flow-matching scheduler with sigmas",
            fix="use FlowMatchEulerDiscreteScheduler",
        )


def _calls_per_step(pipe: Any, got: str) -> ArrowheadError:
    return ArrowheadError(
        f"transformer calls of {_class(pipe)} with {_class(pipe.scheduler)}",
        got=got,
        expected="one per step",
        fix="use FlowMatchEulerDiscreteScheduler, no skipped layers and no true CFG (FLUX with a "
        "negative prompt)",
    )


def _class(thing: Any) -> str:
    return type(thing).__name__


@contextlib.contextmanager
def _no_progress_bar(pipe: Any) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
