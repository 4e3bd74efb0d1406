"""Whole pipelines: load one around a bundle, give it the plan's arguments, make pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plans.errors import ArrowheadError
from plans.plan import Plan, load_plan, resolve_source
from trt_runtime.attachment import attach
from trt_runtime.bundles import load_pretrained, model_source, open_bundle
from trt_runtime.engine import DTYPES
from trt_runtime.live import rows_per_picture
from trt_runtime.transformer import ArrowheadTransformer


@dataclass(frozen=True)
class Picture:
    """One generated picture; latents are the last step's, before the VAE.

    seconds: of the whole pipeline call, shared by the pictures of one call. step_seconds: bucket
    and seconds of each transformer call.
    """

    prompt: str
    seed: int
    image: Any
    latents: Tensor
    seconds: float
    step_seconds: tuple[tuple[int, float], ...]


def load_pipeline(
    folder: Path | str | None = None,
    *,
    plan: Path | str | None = None,
    model: str | None = None,
    backend: str | None = None,
    on_mismatch: str = "error",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Load the bundle's diffusers pipeline with the bundle as its transformer.

    The checkpoint's own transformer weights are not read, unless a backend of PyTorch runs them.
    plan: a plan file in place of a bundle, for those backends; model: the checkpoint, if not the
    one that the plan names; dtype: of the pipeline, fp32 on a CPU and bf16 on a GPU by default.
    """
    if (folder is None) == (plan is None):
        raise ArrowheadError(
            "what to run",
            got="neither a bundle nor a plan" if folder is None else "both a bundle and a plan",
            expected="one of them",
            fix="pass a bundle folder, or a plan",
        )
    if folder is None:
        assert plan is not None
        pipe = _pipeline_of_plan(Path(plan), model, device, dtype)
        attach(pipe, plan=plan, backend=backend, on_mismatch=on_mismatch, **options)
        return pipe
    bundle, _ = open_bundle(folder)
    pipe = load_source_pipeline(
        model_source(bundle, folder),
        # On a CPU half precision is slow where it works at all; the graphs cast on their own.
        dtype=torch.float32 if device == "cpu" else DTYPES[bundle.dtype],
        revision=bundle.model.get("revision"),
        transformer=None,
    ).to(device)
    attach(pipe, folder, backend=backend, on_mismatch=on_mismatch, device=device, **options)
    return pipe


def _pipeline_of_plan(path: Path, model: str | None, device: str, dtype: torch.dtype | None) -> Any:
    plan = load_plan(path)
    source = model or resolve_source(plan, path.resolve().parent)
    if source is None:
        raise ArrowheadError(
            f"plan {path}",
            got="no model.source",
            expected="the checkpoint it was made for",
            fix="pass --model",
        )
    default = torch.float32 if device == "cpu" else torch.bfloat16
    revision = None if model else plan.model.revision
    return load_source_pipeline(source, dtype=dtype or default, revision=revision).to(device)


def load_source_pipeline(
    source: str, *, dtype: torch.dtype, revision: str | None = None, **components: Any
) -> Any:
    """Load a diffusers pipeline from a folder or hub id; components override its own."""
    from diffusers import DiffusionPipeline

    pipe = load_pretrained(
        DiffusionPipeline, source, torch_dtype=dtype, revision=revision, **components
    )
    if type(pipe).__name__ not in ("StableDiffusion3Pipeline", "FluxPipeline"):
        raise ArrowheadError(
            f"pipeline {source}",
            got=type(pipe).__name__,
            expected="StableDiffusion3Pipeline or FluxPipeline",
            fix="use an SD3, SD3.5 or FLUX.1 checkpoint",
        )
    return pipe


def pipeline_kwargs(plan: Plan, pipe: Any) -> dict[str, Any]:
    """Give the arguments with which the pipeline asks the transformer for what the plan holds."""
    text = plan.text_tokens
    if plan.model.architecture == "SD3Transformer2DModel":
        text -= pipe.tokenizer_max_length  # CLIP's tokens come before T5's
    return {
        "height": plan.height,
        "width": plan.width,
        "num_inference_steps": plan.steps,
        "guidance_scale": plan.sampler.guidance_scale,
        "max_sequence_length": text,
    }


def pictures_per_call(transformer: ArrowheadTransformer) -> int:
    """Pictures that one pipeline call may have, from the most rows of the bundle."""
    return transformer.bundle.batch // rows_per_picture(transformer.plan)


def fill(transformer: ArrowheadTransformer, values: Sequence[Any]) -> list[Any]:
    """Repeat the last of one call's values, one a picture, until the bundle takes so few rows."""
    fewest = -(-transformer.bundle.rows[0] // rows_per_picture(transformer.plan))
    return [*values, *[values[-1]] * (fewest - len(values))]


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    on_picture: Callable[[], None] | None = None,
    **overrides: Any,
) -> list[Picture]:
    """Make one picture a prompt; picture i has the noise of seed + i whatever the batch.

    overrides: arguments of the pipeline call in place of the plan's.
    """
    size = pictures_per_call(pipe.transformer)
    pictures: list[Picture] = []
    for start in range(0, len(prompts), size):
        chunk = list(prompts[start : start + size])
        # A call may need more rows than are left: it is filled up, the surplus dropped.
        filled = fill(pipe.transformer, chunk)
        seeds = [seed + start + i for i in range(len(filled))]
        made = draw(pipe, filled, seeds, **overrides)
        pictures += made[: len(chunk)]
        for _ in chunk:
            if on_picture is not None:
                on_picture()
    return pictures


def draw(
    pipe: Any,
    prompts: Sequence[str] | None,
    seeds: Sequence[int],
    *,
    on_step: Callable[[int, Tensor], None] | None = None,
    **overrides: Any,
) -> list[Picture]:
    """Make the pictures of one pipeline call, one a seed: as many as `fill` and the bundle allow.

    prompts: one a seed; None where the overrides hold embeddings. on_step hears each step's number
    and the latents after it; what it raises ends the call.
    """
    transformer: ArrowheadTransformer = pipe.transformer
    last: dict[str, Tensor] = {}

    def keep(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(tensors)
        if on_step is not None:
            on_step(step, tensors["latents"])
        return {}

    arguments = pipeline_kwargs(transformer.plan, pipe) | overrides
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    started = time.perf_counter()
    images = pipe(
        None if prompts is None else list(prompts),
        generator=generators if len(generators) > 1 else generators[0],
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents"],
        **arguments,
    ).images
    seconds = time.perf_counter() - started
    steps = tuple(transformer.state.step_seconds)
    return [
        Picture(prompt, seed, image, latents.float().cpu(), seconds, steps)
        for prompt, seed, image, latents in zip(
            prompts or [""] * len(seeds), seeds, images, last["latents"], strict=True
        )
    ]
