"""Drawing the captions of `bench quality`: pictures, latents of every step, time and work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor

from plans.errors import ArrowheadError
from plans.models import ModelSpec, transformer_flops
from plans.plan import Plan
from plans.tiles import FULL, kept_pairs
from trt_runtime.parity import Progress
from trt_runtime.quality_settings import Settings

# Of a picture's latents, for its error at each step: all of small ones, few beside a 2K picture's.
_LATENT_ITEMS = 16384


@dataclass(frozen=True)
class Drawn:
    """Pictures of one setting, captions in their order, once for every seed; on the CPU.

    pictures: 8 bit [n, 3, height, width]; latents: after every step, fp32 [n, steps, items], the
    same items of each; seconds: of all pipeline calls together; step_ms: of the transformer, a
    picture, for each step; ran: per pipeline call and step the attention modules that were called.
    """

    pictures: Tensor
    latents: Tensor
    seconds: float
    step_ms: list[float] = field(default_factory=list)
    ran: list[list[list[str]]] = field(default_factory=list)


class Meter:
    """Times the transformer at every step and notes which attention modules it calls."""

    def __init__(self, transformer: Any, modules: Sequence[str]) -> None:
        self._transformer, self._modules = transformer, modules
        self._cuda = next(transformer.parameters()).device.type == "cuda"
        self._calls: list[list[tuple[Any, Any]]] = []
        self._pictures: list[int] = []
        self.ran: list[list[list[str]]] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the transformer inside the `with`."""
        handles = [
            self._transformer.get_submodule(name).register_forward_hook(
                lambda *_, name=name: self.ran[-1][-1].append(name)
            )
            for name in self._modules
        ]
        handles.append(self._transformer.register_forward_pre_hook(self._before, prepend=True))
        handles.append(self._transformer.register_forward_hook(self._after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin_call(self, pictures: int) -> None:
        """Say that the next pipeline call begins."""
        self._calls.append([])
        self._pictures.append(pictures)
        self.ran.append([])

    def step_ms(self) -> list[float]:
        """Give the milliseconds of each step, a picture: the median over pipeline calls.

        Calls with fewer pictures than the largest are left out: they cost more a picture.
        """
        if self._cuda:
            torch.cuda.synchronize()
        full = max(self._pictures)
        rows = [
            [self._ms(begin, end) / full for begin, end in calls]
            for calls, pictures in zip(self._calls, self._pictures, strict=True)
            if pictures == full
        ]
        return [median(column) for column in zip(*rows, strict=True)]

    def _before(self, *_: Any) -> None:
        self.ran[-1].append([])
        self._calls[-1].append((self._now(), None))

    def _after(self, *_: Any) -> None:
        begin, _ = self._calls[-1].pop()
        self._calls[-1].append((begin, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self._cuda else 1000 * (end - begin)


class Artist:
    """Draws every caption for every seed, in batches; encodes the captions once."""

    def __init__(self, pipe: Any, settings: Settings, modules: Sequence[str]) -> None:
        self._pipe, self._settings, self._modules = pipe, settings, modules

    def draw(self, steps: int, progress: Progress | None = None) -> Drawn:
        """Draw with `steps` steps and whatever is installed in the transformer."""
        settings, pictures, latents = self._settings, [], []
        meter = Meter(self._pipe.transformer, self._modules)
        begin = time.perf_counter()
        with meter.attached():
            for turn in range(settings.seeds):
                for first, texts in self._texts:
                    start = turn * len(settings.captions) + first
                    count = texts["prompt_embeds"].shape[0]
                    meter.begin_call(count)
                    made, steps_latents = self._call(texts, steps, settings.seed + start, count)
                    pictures.append(made.float().mul(255).round().to(torch.uint8).cpu())
                    latents.append(steps_latents.cpu())
                    self._check(latents[-1])
                    if progress is not None:
                        progress("pictures", start + count, settings.pictures)
        return Drawn(
            torch.cat(pictures), torch.cat(latents), time.perf_counter() - begin,
            meter.step_ms(), meter.ran,
        )  # fmt: skip

    @cached_property
    def _texts(self) -> list[tuple[int, dict[str, Tensor]]]:
        captions, batch = list(self._settings.captions), self._settings.batch
        return [
            (first, self._encode(captions[first : first + batch]))
            for first in range(0, len(captions), batch)
        ]

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> dict[str, Tensor]:
        options = _length(self._settings)
        if type(self._pipe.transformer).__name__.startswith("Flux"):
            text, pooled, _ = self._pipe.encode_prompt(captions, None, **options)
            return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
        cfg = self._settings.guidance_scale > 1
        made = self._pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=cfg, **options
        )
        text, none, pooled, none_pooled = made
        found = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
        if cfg:
            found |= {"negative_prompt_embeds": none, "negative_pooled_prompt_embeds": none_pooled}
        return found

    def _call(
        self, texts: dict[str, Tensor], steps: int, seed: int, count: int
    ) -> tuple[Tensor, Tensor]:
        settings, latents = self._settings, []

        def keep(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
            latents.append(_sample(tensors["latents"]).float())
            return {}

        made = self._pipe(
            **texts,
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(count)],
            output_type="pt",
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"],
            **_length(settings),
        ).images
        return made, torch.stack(latents, dim=1)

    def _check(self, latents: Tensor) -> None:
        if not torch.isfinite(latents[:, -1]).all():
            raise ArrowheadError(
                f"latents of {type(self._pipe).__name__}",
                got=f"values that are not finite in {self._pipe.transformer.dtype}",
                expected="finite latents",
                fix="pass --dtype fp32 or bf16",
            )


def _sample(latents: Tensor) -> Tensor:
    """Take items of each picture's latents, evenly spread; an odd stride falls on all columns."""
    items = latents.flatten(1)
    stride = -(-items.shape[1] // _LATENT_ITEMS)
    return items[:, :: stride | 1]


def _length(settings: Settings) -> dict[str, Any]:
    length = settings.max_sequence_length
    return {} if length is None else {"max_sequence_length": length}


def work_saved(plan: Plan, ran: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """Give the shares of attention and of transformer FLOPs that were not computed.

    plan: what each module does where it runs; ran: the modules called, by pipeline call and step.
    A block that is left out saves its share, by count, of the step's FLOPs.
    """
    assert plan.model.config is not None
    spec = ModelSpec(
        plan.model.architecture, plan.model.config, plan.height, plan.width, plan.text_tokens,
        plan.block, plan.modules,
    )  # fmt: skip
    modules = {module.name: module for module in plan.modules}
    full = {m.name: m.heads * kept_pairs(m.layout, FULL, m.text_output) for m in plan.modules}
    of_bucket = [transformer_flops(spec, b.modes, 1)["total"] for b in plan.buckets]
    dense = transformer_flops(spec, None, 1)["total"]
    kept = done = 0.0
    for call in ran:
        for step, names in enumerate(call):
            modes = plan.modes_at(step)
            for name in names:
                m = modules[name]
                kept += sum(kept_pairs(m.layout, mode, m.text_output) for mode in modes[name])
            done += of_bucket[plan.schedule[step]] * len(names) / len(modules)
    steps = len(ran) * plan.steps
    return {
        "attention_flops_saved": 1 - kept / (steps * sum(full.values())),
        "transformer_flops_saved": 1 - done / (steps * dense),
    }
