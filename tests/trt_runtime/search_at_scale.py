"""What a search costs beside plain runs, on the real architectures with random weights.

    python -m tests.trt_runtime.search_at_scale flux --device cuda --json build/search-flux.json
    python -m tests.trt_runtime.search_at_scale sd3 --device cuda --steps 50 --prices prices.json

A 2K picture, few steps, extrapolated to 50, or with `--steps 50` a plain run and a search, whole;
the report is written again after every stage. On a CPU `--small` takes two narrow blocks and a
small picture. Random weights have no locality, so where steps are few a plan of our own, a third of
the heads in each mode, stands for what a trained model's search would run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import sdpa_kernel

from plans.denoising import Denoising, dense_plan_of
from plans.effort import AGES, Effort, effort_for
from plans.plan import Bucket, Plan
from plans.pooled import choose_pooled
from plans.prices import Prices, load_prices
from plans.runs import Runs, Scratch
from plans.scores import BACKENDS
from plans.search import search_plan
from plans.tables import HeadTables
from plans.tiles import CACHED, FULL, candidate_half_windows
from tests.trt_runtime.real_shapes import FLUX, SD3, TEXT_TOKENS
from trt_runtime.doctor import device_name, versions
from trt_runtime.kernels import use_kernels

FULL_DEPTH = {"flux": {"num_layers": 19, "num_single_layers": 38}, "sd3": {"num_layers": 24}}
SMALL = {
    "flux": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2,
             "joint_attention_dim": 32, "pooled_projection_dim": 16},
    "sd3": {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 32,
            "caption_projection_dim": 128, "pooled_projection_dim": 16},
}  # fmt: skip
TARGET_STEPS = 50


def pipeline(kind: str, small: bool, device: str, dtype: torch.dtype) -> Any:
    """A pipeline of one transformer with random weights, made where it runs."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    config: dict[str, Any] = {**(FLUX if kind == "flux" else SD3),
                              **(SMALL if small else FULL_DEPTH)[kind]}  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if kind == "flux":
                model: Any = FluxTransformer2DModel(**config)
            else:
                model = SD3Transformer2DModel(**config)
    finally:
        torch.set_default_dtype(default)
    model = model.to(device).eval()
    if kind == "flux":
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        return FluxPipeline(scheduler, None, None, None, None, None, model)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(model, scheduler, None, None, None, None, None, None, None)


def embeddings(pipe: Any, kind: str, pictures: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random prompt embeddings; SD3's negative ones too."""
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(0)
    device, dtype = pipe.transformer.device, pipe.transformer.dtype
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    if kind == "sd3":
        names += [f"negative_{name}" for name in names]
    return {
        name: torch.randn(
            pictures,
            *((config.pooled_projection_dim,) if "pooled" in name
              else (tokens, config.joint_attention_dim)),
            generator=generator,
        ).to(device, dtype)
        for name in names
    }  # fmt: skip


class Clock:
    """Milliseconds of every transformer call, from hooks that wait for the device."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.calls: list[float] = []
        self._begin = 0.0
        self._device = next(model.parameters()).device
        model.register_forward_pre_hook(lambda *_: self._start())
        model.register_forward_hook(lambda *_: self._stop())

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _start(self) -> None:
        self._begin = self._now()

    def _stop(self) -> None:
        self.calls.append(1e3 * (self._now() - self._begin))

    def median(self, run: Callable[[], Any]) -> float:
        """Median of the calls of a run but for the first two, which warm up."""
        self.calls.clear()
        run()
        return float(np.median(self.calls[2:]))


def third_each(bare: Plan) -> Plan:
    """Buckets: all full, and a third of the heads in each mode, read for three steps of four."""
    modes = {}
    for module in bare.modules:
        windows = candidate_half_windows(module.layout)
        window = windows[len(windows) // 2] if windows else FULL
        modes[module.name] = ((FULL, window, CACHED) * module.heads)[: module.heads]
    full = {module.name: (FULL,) * module.heads for module in bare.modules}
    schedule = tuple(int(step % 4 > 0) for step in range(bare.steps))
    return replace(bare, buckets=(Bucket(full), Bucket(modes)), schedule=schedule)


def tables_like(bare: Plan, seed: int = 0) -> HeadTables:
    """Errors at 50 steps for a model of this size: heads differ, change slowly, and age."""
    rng = np.random.default_rng(seed)
    heads = tuple(module.heads for module in bare.modules)
    rows, steps = sum(heads), TARGET_STEPS
    depth = np.repeat(rng.normal(0, 0.4, len(heads)), heads)
    drift = np.cumsum(rng.normal(0, 0.05, (2, steps, rows)), axis=1)
    wide = rng.normal(-2.0, 0.9, rows) + depth + drift[0]
    narrower = np.cumsum(np.abs(rng.normal(0.35, 0.15, (rows, 2))), axis=1)
    arrow = 10 ** np.stack([wide + narrower[:, 1], wide + narrower[:, 0], wide], axis=2)
    time_ = np.linspace(0, 1, steps)[:, None]
    rate = rng.normal(-2.9, 0.6, rows) + depth + drift[1]
    rate = rate + 0.9 * np.exp(-time_ / 0.08) + 0.5 * np.exp((time_ - 1) / 0.05)
    ages = np.arange(1, AGES + 1)
    cached = 10 ** rate[:, :, None] * ages ** rng.uniform(1.0, 1.9, rows)[:, None]
    cached = np.where(ages <= np.arange(steps)[:, None, None], cached, np.inf)
    saving = np.tile([0.905, 0.875, 0.82], (rows, 1))
    return HeadTables(heads, (2, 4, 8), arrow, cached, saving, np.ones(rows))


def plain_ms(pipe: Any, settings: Denoising, clock: Clock) -> float:
    """A step of the stock pipeline on one prompt, attention by what the search has, too."""
    with sdpa_kernel(BACKENDS, set_priority=True) if _on_gpu(pipe) else nullcontext():
        return clock.median(lambda: pipe(**settings.arguments()))


def _on_gpu(pipe: Any) -> bool:
    return pipe.transformer.device.type == "cuda"


def measure(
    arguments: argparse.Namespace, report: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fill the report stage by stage."""
    kind, dtype = arguments.kind, torch.bfloat16 if arguments.device == "cuda" else torch.float32
    pipe = pipeline(kind, arguments.small, arguments.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    report["attention"] = use_kernels(arguments.device, dtype)
    side, tokens = (256, 16) if arguments.small else (2048, TEXT_TOKENS[kind])
    block = 16 if arguments.small else 128
    prompts = embeddings(pipe, kind, arguments.prompts, tokens)
    settings = Denoising(prompts, arguments.steps, side, side, 3.5, None, 0)
    one = next(settings.groups(1))
    bare = dense_plan_of(pipe, one, block, None, None)
    clock = Clock(pipe.transformer)
    report["plain_ms"] = plain_ms(pipe, one, clock)
    save()
    if _on_gpu(pipe):
        torch.cuda.reset_peak_memory_stats()
        report["model_bytes"] = torch.cuda.memory_allocated()
    if arguments.steps < TARGET_STEPS:
        _parts(pipe, one, bare, clock, report, save)
        extrapolate(report, arguments.prompts)
        save()
    prices = None if arguments.prices is None else load_prices(arguments.prices)
    search(pipe, settings, block, prices, report)
    save()


def _parts(
    pipe: Any,
    one: Denoising,
    bare: Plan,
    clock: Clock,
    report: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Time what a search is made of: its two kinds of runs, and choosing."""
    plain = report["plain_ms"]
    windows = {m.name: (*candidate_half_windows(m.layout), CACHED) for m in bare.modules}
    runs = Runs(pipe, one, Effort(1, 1, False), windows, lambda *_: None, Scratch(None, {}, False))
    for name, plan in (("recorded_ms", bare), ("planned_ms", third_each(bare))):
        report[name] = clock.median(lambda plan=plan, name=name: runs.run(plan, name, 0, True))
        report[name.replace("_ms", "_ratio")] = report[name] / plain
        save()
    if _on_gpu(pipe):
        report["peak_bytes"] = torch.cuda.max_memory_allocated()
    begin = time.perf_counter()
    choice = choose_pooled(tables_like(bare), 0.4, 1.5, 4)
    report["choose_seconds"] = time.perf_counter() - begin
    report["choose_saved"] = choice.saving / (TARGET_STEPS * sum(m.heads for m in bare.modules))


def search(
    pipe: Any, settings: Denoising, block: int, prices: Prices | None, report: dict[str, Any]
) -> None:
    """Search as `arrowhead plan search` does, with the steps there are."""
    on_gpu = _on_gpu(pipe)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    found = search_plan(
        pipe, settings.prompts, steps=settings.steps, height=settings.height, width=settings.width,
        delta=0.4, block=block, guidance_scale=settings.guidance_scale, prices=prices,
        announce=lambda text: report.update(announced=text),
    )  # fmt: skip
    assert found.search is not None
    report["search_seconds"] = time.perf_counter() - begin
    plain = settings.steps * settings.pictures * report["plain_ms"] / 1e3
    report["search_ratio"] = report["search_seconds"] / plain
    report["search_runs"] = 1 + found.search["measurements"]
    report["search_basis"] = found.search["basis"]
    report["search_prices"] = found.search.get("prices")
    if on_gpu:
        report["search_peak_bytes"] = torch.cuda.max_memory_allocated()


def extrapolate(report: dict[str, Any], prompts: int) -> None:
    """What a search of 50 steps takes, and how much that is of the plain runs it rides on."""
    rounds = effort_for(1e18, prompts).rounds
    steps = report["recorded_ms"] + rounds * report["planned_ms"]
    seconds = TARGET_STEPS * steps / 1e3 + report["choose_seconds"]
    plain = TARGET_STEPS * prompts * report["plain_ms"] / 1e3
    report["extrapolated"] = {
        "prompts": prompts, "runs": 1 + rounds, "steps": TARGET_STEPS, "search_seconds": seconds,
        "plain_seconds": plain, "ratio": seconds / plain,
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Print the report, and write it as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(FULL_DEPTH))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--prices", type=Path, help="of `arrowhead bench attention --price`")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    report: dict[str, Any] = {
        "kind": arguments.kind, "device": device_name(arguments.device), "versions": versions(),
        "steps": arguments.steps,
    }  # fmt: skip
    begin = time.perf_counter()

    def save() -> None:
        report["seconds"] = round(time.perf_counter() - begin, 1)
        text = json.dumps(report, indent=2)
        print(text, flush=True)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(text)

    with torch.no_grad():
        measure(arguments, report, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
