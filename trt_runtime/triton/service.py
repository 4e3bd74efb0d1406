"""The owner of a served pipeline: engines, denoising loop, caches; one call of it at a time."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trt_runtime.pipeline import Picture, draw, fill, load_pipeline, pictures_per_call
from trt_runtime.transformer import ArrowheadTransformer
from trt_runtime.triton.request import Asked

Preview = Callable[[], list[Any]]
OnStep = Callable[[int, Preview | None], None]


class PictureService:
    """A pipeline around a bundle that draws several requests' pictures in one call.

    options: load_pipeline's.
    """

    def __init__(self, folder: Path | str, **options: Any) -> None:
        self.pipe = load_pipeline(folder, **options)
        self.pipe.set_progress_bar_config(disable=True)
        self.pictures_per_call = pictures_per_call(self.transformer)

    @property
    def transformer(self) -> ArrowheadTransformer:
        return self.pipe.transformer

    def draw(self, asked: Sequence[Asked], on_step: OnStep) -> list[list[Picture]]:
        """Draw requests that agree on `Asked.call`; give each request its pictures.

        They are at most pictures_per_call in all; rows that the bundle needs beyond theirs are
        filled with the last one's. on_step(steps done, preview) hears the end of each step; what it
        raises ends the call. However a call ends, the transformer then forgets it.
        """
        prompts, seeds, overrides = self._arguments(asked)
        steps = _Steps(self.pipe, on_step)
        # What a call that never began has run: nothing.
        self.transformer.state.forget_times()
        try:
            pictures = draw(self.pipe, prompts, seeds, on_step=steps, **overrides)
        finally:
            self.transformer.reset()
        start = iter(pictures)
        return [[next(start) for _ in one.seeds] for one in asked]

    def buckets_run(self) -> list[int]:
        """Give the bucket of each transformer call of the last draw, finished or not."""
        return self.transformer.state.buckets_run

    def close(self) -> None:
        """Release engines, weights and caches."""
        self.transformer.close()

    def _arguments(
        self, asked: Sequence[Asked]
    ) -> tuple[list[str] | None, list[int], dict[str, Any]]:
        """Give prompts, seeds and the other arguments of a call with rows enough."""

        def filled(values: Iterator[Any]) -> list[Any]:
            return fill(self.transformer, list(values))

        overrides: dict[str, Any] = {"guidance_scale": asked[0].guidance}
        for name in asked[0].embeddings or ():
            given = (row for one in asked for row in (one.embeddings or {})[name])
            tensors = [torch.from_numpy(row.copy()) for row in filled(given)]
            overrides[name] = torch.stack(tensors).to(self.pipe.device, self.pipe.dtype)
        if any(one.negatives for one in asked):
            texts = (text for one in asked for text in one.negatives or [""] * len(one.seeds))
            overrides["negative_prompt"] = filled(texts)
        prompts = None
        if asked[0].prompts is not None:
            prompts = filled(text for one in asked for text in one.prompts or ())
        return prompts, filled(seed for one in asked for seed in one.seeds), overrides


class _Steps:
    """Turn the pipeline's steps into (steps done, preview)."""

    def __init__(self, pipe: Any, on_step: OnStep) -> None:
        self._pipe = pipe
        self._on_step = on_step
        self._before: Tensor | None = None

    def __call__(self, step: int, latents: Tensor) -> None:
        before, self._before = self._before, latents
        preview: Preview | None = None
        if before is not None:
            preview = functools.partial(_foresee, self._pipe, step, before, latents)
        self._on_step(step + 1, preview)


@torch.no_grad()
def _foresee(pipe: Any, step: int, before: Tensor, after: Tensor) -> list[Any]:
    """Draw where two latents in a row lead: Euler steps are straight, so extend the last one.

    before, after: latents of steps `step` - 1 and `step`. Gives PIL images.
    """
    sigma, following = (float(s) for s in pipe.scheduler.sigmas[step : step + 2])
    latents = after + (after - before) * (following / (sigma - following))
    if hasattr(pipe, "_unpack_latents"):
        plan = pipe.transformer.plan
        latents = pipe._unpack_latents(latents, plan.height, plan.width, pipe.vae_scale_factor)
    config = pipe.vae.config
    latents = latents / config.scaling_factor + config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0])


def png(image: Any) -> bytes:
    """Encode a PIL image; fast, as the files are sent and not kept: some percent larger."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
