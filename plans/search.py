"""Find a plan: record what every mode would err in one run, choose, and measure what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from plans.accounting import account
from plans.bounds import Bounds, raise_offenders
from plans.buckets import Choice, check_bucket_limit, choose_buckets
from plans.denoising import Denoising, Prompts, denoise, dense_plan_of
from plans.errors import ArrowheadError
from plans.models import AttentionModule
from plans.plan import Bucket, Plan
from plans.strategies import ChooseHeads, HeadErrors, MeasureHeads, Recorder, pairs_saved
from plans.tiles import CACHED, FULL, candidate_half_windows, kept_pairs

CANDIDATES = ("arrow", "cache")
METHODS = ("joint", "progressive")
AGES = 10  # steps that a cached head may be old
_AIM = 0.95  # of the bound, to the power of the attempts
METRIC = "relative squared error per head: mean (O_m - O)^2 / mean (O - mean O)^2, in fp32"

Progress = Callable[[str, int, int, float], None]  # stage, steps done, steps, saving so far


def search_plan(
    pipe: Any,
    prompts: Prompts,
    *,
    steps: int,
    height: int,
    width: int,
    delta: float,
    cap_factor: float = 1.5,
    divisors: Sequence[int] = (8, 16, 32),
    candidates: Sequence[str] = CANDIDATES,
    block: int = 128,
    method: str = "joint",
    max_buckets: int = 4,
    guidance_scale: float,
    max_sequence_length: int | None = None,
    seed: int = 0,
    rounds: int = 6,
    source: Path | str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Search a plan for a StableDiffusion3Pipeline or FluxPipeline at one size and step count.

    delta bounds the sum over heads of relative squared errors in each (step, module), and
    cap_factor * delta / H each head's; both hold in the final measurement. method: "joint" chooses
    at most max_buckets buckets, their modes and the schedule together (plans.buckets);
    "progressive" is DiTFastAttnV2's, step by step, with a graph for each step; it is also what
    "joint" does where there may be as many buckets as steps. source: the pipeline's local folder or
    hub id, for the plan's model reference. Raises ArrowheadError for pipelines that are not planned
    for, by name.
    """
    begin = time.perf_counter()
    settings = Denoising(prompts, steps, height, width, guidance_scale, max_sequence_length, seed)
    _check_arguments(settings, delta, cap_factor, candidates, method)
    check_bucket_limit(max_buckets)
    report = progress or (lambda *_: None)
    bare = dense_plan_of(pipe, settings, block, source, revision)
    modes = {m.name: _candidate_modes(m, candidates, divisors) for m in bare.modules}
    bounds = Bounds(delta, cap_factor)
    if max_buckets >= steps:
        method = "progressive"
    if method == "joint":
        found = _joint(pipe, settings, bare, modes, bounds, max_buckets, rounds, report)
    else:
        plan = _progressive(pipe, settings, bare, modes, bounds, report)
        found = _raised(pipe, settings, plan, modes, bounds, rounds, report)
    plan, errors, measurements = found
    sums = {m.name: [float(f"{sum(e[m.name]):.6g}") for e in errors] for m in plan.modules}
    record = _run_record(pipe, settings) | dict(
        method=method, delta=delta, cap_factor=cap_factor, candidates=list(candidates),
        divisors=list(divisors), max_buckets=max_buckets if method == "joint" else None,
        measurements=measurements, seconds=round(time.perf_counter() - begin, 3), errors=sums,
    )  # fmt: skip
    accounting = account(plan, batch=2 if plan.sampler.cfg else 1)
    return replace(plan, search=record, accounting=accounting)


def _joint(
    pipe: Any,
    settings: Denoising,
    bare: Plan,
    candidates: Mapping[str, Sequence[int]],
    bounds: Bounds,
    max_buckets: int,
    rounds: int,
    report: Progress,
) -> tuple[Plan, HeadErrors, int]:
    """Record a run, choose, and run that; choose again from what the run itself records.

    The first run is in full, the next ones follow their plan: errors are those of the activations
    the plan leads to. Where no choice of `rounds` keeps the bounds, the last is raised until it
    does.
    """
    dense = settings.steps * sum(
        m.heads * kept_pairs(m.layout, FULL, m.text_output) for m in bare.modules
    )
    recorder = Recorder(bare.modules, candidates, settings.steps, AGES)
    errors = _measure(pipe, settings, bare, "record", report, recorder)
    choice = choose_buckets(
        recorder.tables(), *bounds, max_buckets,
        progress=lambda i, n, saved: report("choose", i, n, saved / dense),
    )  # fmt: skip
    for turn in range(1, rounds + 1):
        plan = _plan_of(bare, choice)
        recorder = Recorder(bare.modules, candidates, settings.steps, AGES)
        errors = _measure(pipe, settings, plan, f"measure {turn}", report, recorder)
        if not bounds.broken(bare.modules, errors):
            return plan, errors, turn
        measured = [[e for m in bare.modules for e in row[m.name]] for row in errors]
        tables = recorder.tables().corrected(choice, np.array(measured))
        # A new choice leads to other activations yet: aim lower each time.
        aim = bounds.delta * _AIM ** (turn + 1)
        choice = choose_buckets(tables, aim, bounds.cap_factor, max_buckets, start=choice.schedule)
    plan = raise_offenders(plan, errors, bounds, candidates)
    plan, errors, more = _raised(pipe, settings, plan, candidates, bounds, rounds, report)
    return plan, errors, rounds + more


def _plan_of(bare: Plan, choice: Choice) -> Plan:
    ends = np.cumsum([module.heads for module in bare.modules])
    buckets = tuple(
        Bucket(
            {
                module.name: tuple(int(mode) for mode in row[end - module.heads : end])
                for module, end in zip(bare.modules, ends, strict=True)
            }
        )
        for row in choice.modes
    )
    return replace(bare, buckets=buckets, schedule=choice.schedule)


def _progressive(
    pipe: Any,
    settings: Denoising,
    bare: Plan,
    candidates: Mapping[str, Sequence[int]],
    bounds: Bounds,
    report: Progress,
) -> Plan:
    """Choose at every step as the run comes to it; steps of equal choices share a bucket."""
    strategy = ChooseHeads(bare.modules, candidates, *bounds)
    dense = sum(m.heads * kept_pairs(m.layout, FULL, m.text_output) for m in bare.modules)

    def step_done(step: int) -> None:
        saved = sum(pairs_saved(strategy.savings, modes) for modes in strategy.modes)
        report("search", step + 1, settings.steps, saved / ((step + 1) * dense))

    denoise(pipe, settings, bare.modules, strategy, step_done)
    distinct: list[dict[str, tuple[int, ...]]] = []
    for modes in strategy.modes:
        if modes not in distinct:
            distinct.append(modes)
    schedule = tuple(distinct.index(modes) for modes in strategy.modes)
    return replace(bare, buckets=tuple(Bucket(modes) for modes in distinct), schedule=schedule)


def measure(
    pipe: Any,
    plan: Plan,
    prompts: Prompts,
    *,
    guidance_scale: float | None = None,
    max_sequence_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeadErrors:
    """Run the plan and return, per step, module and head, its error against full attention.

    Both outputs come from the same live q, k, v, which the plan's own output has led to.
    """
    scale = plan.sampler.guidance_scale if guidance_scale is None else guidance_scale
    settings = Denoising(
        prompts, plan.steps, plan.height, plan.width, scale, max_sequence_length, seed
    )
    return _measure(pipe, settings, plan, "measure", progress or (lambda *_: None))


def _measure(
    pipe: Any,
    settings: Denoising,
    plan: Plan,
    stage: str,
    report: Progress,
    recorder: Recorder | None = None,
) -> HeadErrors:
    strategy = MeasureHeads(plan, recorder)
    saved = account(plan, 1)["per_step"]

    def step_done(step: int) -> None:
        report(stage, step + 1, plan.steps, sum(saved[: step + 1]) / (step + 1))

    denoise(pipe, settings, plan.modules, strategy, step_done)
    return strategy.errors


def _raised(
    pipe: Any,
    settings: Denoising,
    plan: Plan,
    candidates: Mapping[str, Sequence[int]],
    bounds: Bounds,
    rounds: int,
    report: Progress,
) -> tuple[Plan, HeadErrors, int]:
    """Measure, raise the heads that break the bounds, and measure again until none does.

    From the last of `rounds` on they become full at once; each round then leaves fewer heads to
    raise, so it ends. Returns the plan, its measured errors and the number of measurements.
    """
    count = 0
    while True:
        count += 1
        errors = _measure(pipe, settings, plan, f"check {count}", report)
        if not bounds.broken(plan.modules, errors):
            return plan, errors, count
        plan = raise_offenders(plan, errors, bounds, candidates if count < rounds else None)


def _check_arguments(
    settings: Denoising,
    delta: float,
    cap_factor: float,
    candidates: Sequence[str],
    method: str,
) -> None:
    if method not in METHODS:
        raise ArrowheadError(
            "search method", got=method, expected=f"one of {', '.join(METHODS)}", fix="name one"
        )
    unknown = sorted(set(candidates) - set(CANDIDATES))
    if unknown or not candidates:
        raise ArrowheadError(
            "candidates",
            got=unknown or "none",
            expected=f"some of {', '.join(CANDIDATES)}",
            fix="name the modes to try beside full attention",
        )
    if delta < 0 or cap_factor <= 0:
        raise ArrowheadError(
            "error bounds",
            got=f"delta {delta}, cap_factor {cap_factor}",
            expected="delta >= 0 and cap_factor > 0",
            fix="start from delta 0.2 and cap_factor 1.5",
        )
    if settings.steps < 1 or settings.pictures < 1:
        raise ArrowheadError(
            "search run",
            got=f"{settings.steps} steps, {settings.pictures} prompts",
            expected="at least one of each",
            fix="give the step count of your deployment and a few typical prompts",
        )


def _candidate_modes(
    module: AttentionModule, candidates: Sequence[str], divisors: Sequence[int]
) -> tuple[int, ...]:
    """Modes to try on each head, FULL aside."""
    layout = module.layout
    arrows = candidate_half_windows(layout, divisors) if "arrow" in candidates else ()
    if not arrows and "cache" not in candidates:
        raise ArrowheadError(
            f"arrow candidates of {module.name}",
            got=f"none: {layout.image_tokens} image tokens are {layout.blocks} blocks",
            expected="windows narrower than the picture",
            fix=f"use a block smaller than {layout.block}, larger divisors or a larger picture",
        )
    return (*arrows, CACHED) if "cache" in candidates else arrows


def _run_record(pipe: Any, settings: Denoising) -> dict[str, Any]:
    prompts: list[str] | str = f"{settings.pictures} precomputed embeddings"
    if not isinstance(settings.prompts, Mapping):
        prompts = list(settings.prompts)
    return {
        "metric": METRIC,
        "prompts": prompts,
        "seed": settings.seed,
        "guidance_scale": settings.guidance_scale,
        "max_sequence_length": settings.max_sequence_length,
        "device": str(pipe.transformer.device),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }
