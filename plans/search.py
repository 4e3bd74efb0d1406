"""Find a plan in one progressive denoising run, merge its steps, and measure what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from plans.accounting import account
from plans.denoising import Denoising, Prompts, denoise, dense_plan_of
from plans.errors import ArrowheadError
from plans.models import AttentionModule
from plans.plan import Bucket, Plan
from plans.scores import HeadErrors, MeasureHeads, SearchHeads, pairs_saved
from plans.solver import check_bucket_limit, merge_steps
from plans.tiles import CACHED, FULL, candidate_half_windows, kept_pairs

CANDIDATES = ("arrow", "cache")
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
    max_buckets: int = 6,
    guidance_scale: float,
    max_sequence_length: int | None = None,
    seed: int = 0,
    rounds: int = 4,
    source: Path | str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Search a plan for a StableDiffusion3Pipeline or FluxPipeline at one size and step count.

    delta bounds the sum over heads of relative squared errors in each (step, module), and
    cap_factor * delta / H each head's; both hold in the final measurement. source: the pipeline's
    local folder or hub id, for the plan's model reference. Raises ArrowheadError for pipelines
    that are not planned for, by name.
    """
    begin = time.perf_counter()
    settings = Denoising(prompts, steps, height, width, guidance_scale, max_sequence_length, seed)
    _check_arguments(settings, delta, cap_factor, candidates)
    check_bucket_limit(max_buckets)
    report = progress or (lambda *_: None)
    bare = dense_plan_of(pipe, settings, block, source, revision)
    modes = {m.name: _candidate_modes(m, candidates, divisors) for m in bare.modules}
    strategy = SearchHeads(bare.modules, modes, delta, cap_factor)
    unmerged = _progressive_run(pipe, settings, bare, strategy, report)
    plan = _merged(bare, strategy, delta, cap_factor, max_buckets)
    plan, errors, measured = _mend(pipe, settings, plan, modes, delta, cap_factor, rounds, report)
    sums = {m.name: [float(f"{sum(e[m.name]):.6g}") for e in errors] for m in plan.modules}
    record = _run_record(pipe, settings) | dict(
        delta=delta, cap_factor=cap_factor, candidates=list(candidates), divisors=list(divisors),
        max_buckets=max_buckets, saving_unmerged=unmerged, measurements=measured,
        seconds=round(time.perf_counter() - begin, 3), errors=sums,
    )  # fmt: skip
    accounting = account(plan, batch=2 if plan.sampler.cfg else 1)
    return replace(plan, search=record, accounting=accounting)


def _merged(
    bare: Plan, strategy: SearchHeads, delta: float, cap_factor: float, max_buckets: int
) -> Plan:
    cap = cap_factor * delta / max(module.heads for module in bare.modules)
    merged = merge_steps(strategy.scores, strategy.savings, delta, cap, max_buckets)
    buckets = tuple(Bucket(modes) for modes in merged.buckets)
    return replace(bare, buckets=buckets, schedule=tuple(merged.schedule))


def _progressive_run(
    pipe: Any, settings: Denoising, plan: Plan, strategy: SearchHeads, report: Progress
) -> float:
    """Let the strategy choose at every step; return the share of attention its choices save."""
    dense = sum(m.heads * kept_pairs(m.layout, FULL, m.text_output) for m in plan.modules)

    def saving() -> float:
        saved = sum(pairs_saved(strategy.savings, modes) for modes in strategy.modes)
        return saved / (len(strategy.modes) * dense)

    def step_done(step: int) -> None:
        report("search", step + 1, settings.steps, saving())

    denoise(pipe, settings, plan.modules, strategy, step_done)
    return round(saving(), 6)


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
    pipe: Any, settings: Denoising, plan: Plan, stage: str, report: Progress
) -> HeadErrors:
    strategy = MeasureHeads(plan)
    saved = account(plan, 1)["per_step"]

    def step_done(step: int) -> None:
        report(stage, step + 1, plan.steps, sum(saved[: step + 1]) / (step + 1))

    denoise(pipe, settings, plan.modules, strategy, step_done)
    return strategy.errors


def _mend(
    pipe: Any,
    settings: Denoising,
    plan: Plan,
    candidates: Mapping[str, Sequence[int]],
    delta: float,
    cap_factor: float,
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
        errors = _measure(pipe, settings, plan, f"measure {count}", report)
        raised = raise_offenders(
            plan, errors, delta, cap_factor, candidates if count < rounds else None
        )
        if raised == plan:
            return plan, errors, count
        plan = raised


def raise_offenders(
    plan: Plan,
    errors: HeadErrors,
    delta: float,
    cap_factor: float,
    candidates: Mapping[str, Sequence[int]] | None,
) -> Plan:
    """Raise heads until no measured (step, module) sum nor head error is over its bound.

    A raised head goes from CACHED to the widest arrow, from any narrower arrow too, and from there
    to FULL; without candidates straight to FULL. A raised head counts as error 0.
    """
    tables = [{name: list(modes) for name, modes in b.modes.items()} for b in plan.buckets]
    raised: set[tuple[int, str, int]] = set()
    for bucket, row in zip(plan.schedule, errors, strict=True):
        for module in plan.modules:
            own = row[module.name]
            live = [h for h in range(module.heads) if (bucket, module.name, h) not in raised]
            live.sort(key=lambda head, own=own: (own[head], head))  # type: ignore[misc]
            total = sum(own[head] for head in live)
            cap = cap_factor * delta / module.heads
            while live and (total > delta or own[live[-1]] > cap):
                head = live.pop()
                total = sum(own[h] for h in live)
                raised.add((bucket, module.name, head))
    for bucket, name, head in raised:
        arrows = [mode for mode in (candidates or {}).get(name, ()) if mode >= 0]
        mode = tables[bucket][name][head]
        widest = max(arrows, default=FULL)
        tables[bucket][name][head] = widest if mode < widest else FULL
    distinct: list[Bucket] = []
    index = []
    for table in tables:
        merged = Bucket({name: tuple(modes) for name, modes in table.items()})
        if merged not in distinct:
            distinct.append(merged)
        index.append(distinct.index(merged))
    schedule = tuple(index[bucket] for bucket in plan.schedule)
    return replace(plan, buckets=tuple(distinct), schedule=schedule)


def _check_arguments(
    settings: Denoising, delta: float, cap_factor: float, candidates: Sequence[str]
) -> None:
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
