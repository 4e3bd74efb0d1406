"""Find a plan: record what every mode would err in one run, choose, and measure what came out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from plans.accounting import account
from plans.bounds import Bounds
from plans.buckets import check_bucket_limit
from plans.carry import spec_of
from plans.check import check_plan
from plans.denoising import Denoising, Prompts, dense_plan_of
from plans.effort import BY_SIZE, Effort, Wanted, check_memory, effort_for
from plans.errors import ArrowheadError
from plans.importance import ERROR_WEIGHTS, HEAD
from plans.methods import Found, Search
from plans.models import AttentionModule
from plans.plan import Plan
from plans.prices import Prices
from plans.runs import Progress, Runs, Scratch, fingerprint
from plans.strategies import HeadErrors, errors_by_module
from plans.tables import HeadTables
from plans.tiles import CACHED, candidate_half_windows

CANDIDATES = ("arrow", "cache")
DIVISORS = (8, 16, 32)
JOINT, PROGRESSIVE, POOLED = METHODS = ("joint", "progressive", "pooled")
METRIC = "relative squared error per head: mean (O_m - O)^2 / mean (O - mean O)^2, in fp32"


def search_plan(
    pipe: Any,
    prompts: Prompts,
    *,
    steps: int,
    height: int,
    width: int,
    delta: float,
    cap_factor: float = 1.5,
    divisors: Sequence[int] = DIVISORS,
    candidates: Sequence[str] = CANDIDATES,
    uncached: Sequence[str] = (),
    block: int = 128,
    method: str = POOLED,
    max_buckets: int = 4,
    first_step: str = "full",
    guidance_scale: float,
    max_sequence_length: int | None = None,
    seed: int = 0,
    wanted: Wanted = BY_SIZE,
    prices: Prices | None = None,
    error_weights: str = HEAD,
    source: Path | str | None = None,
    revision: str | None = None,
    scratch: Path | None = None,
    resume: bool = False,
    announce: Callable[[str], None] | None = None,
    keep_tables: Callable[[HeadTables], None] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Search a plan for a StableDiffusion3Pipeline or FluxPipeline at one size and step count.

    delta bounds the mean, over steps and modules, of the sum over heads of relative squared errors;
    at most max_buckets buckets, their modes and the schedule are chosen together (plans.pooled).
    method: "joint" bounds each of those sums, and each head's error by cap_factor * delta / H
    (plans.buckets), or, with a bucket for each step, is "progressive": DiTFastAttnV2's way, step by
    step. first_step: "arrow" lets step 0 have arrows. uncached: modules, by name, that cache no
    heads. wanted: how much is run. prices: save milliseconds, not pairs. error_weights: see
    plans.importance. scratch: of finished runs, which resume takes up. announce is told the memory
    needed, keep_tables the errors recorded. Raises ArrowheadError for what is not planned for.
    """
    begin = time.perf_counter()
    settings = Denoising(prompts, steps, height, width, guidance_scale, max_sequence_length, seed)
    method = _checked(settings, delta, cap_factor, candidates, method, max_buckets)
    bare = dense_plan_of(pipe, settings, block, source, revision)
    effort = _effort(bare, settings, wanted, together=method == PROGRESSIVE)
    modes = _tried(bare, candidates, divisors, uncached)
    search = Search(pipe, settings, bare, modes, Bounds(delta, cap_factor, method == POOLED),
                    effort, prices, progress, first_step, error_weights)  # fmt: skip
    check_memory(memory := search.memory(), pipe, announce)
    asked: dict[str, Any] = dict(
        method=method, delta=delta, cap_factor=cap_factor, candidates=list(candidates),
        uncached=list(uncached), divisors=list(divisors), error_weights=error_weights,
        max_buckets=None if method == PROGRESSIVE else max_buckets, first_step=first_step,
        sample_tokens=effort.sample_tokens,
    )  # fmt: skip
    search.begin(Scratch(scratch, _identity(settings, bare, effort, asked), resume))
    found = search.found(method, max_buckets, keep_tables)
    record = _run_record(pipe, settings, error_weights) | asked | {"memory_bytes": memory}
    return _finished(found, record | search.priced(found.plan), begin)


def _finished(found: Found, record: dict[str, Any], begin: float) -> Plan:
    """Return the plan with its record, the time since `begin` in it, and what it saves."""
    record = record | {"seconds": round(time.perf_counter() - begin, 3)} | found.record()
    return replace(found.plan, search=record, accounting=account(found.plan, _rows(found.plan)))


def _rows(plan: Plan) -> int:
    """Rows of a transformer call for one picture."""
    return 2 if plan.sampler.cfg else 1


def _effort(bare: Plan, settings: Denoising, wanted: Wanted, together: bool) -> Effort:
    """How much is run; together: all prompts in one call, since each choice needs them all."""
    flops = account(bare, _rows(bare))["transformer_flops"]
    effort = effort_for(flops, settings.pictures, wanted)
    return replace(effort, pictures_per_run=settings.pictures) if together else effort


def _identity(
    settings: Denoising, bare: Plan, effort: Effort, asked: dict[str, Any]
) -> dict[str, Any]:
    """All that a search's runs depend on."""
    return fingerprint(settings) | asked | {"plan": bare.sha256, "effort": asdict(effort)}


def measure(
    pipe: Any,
    plan: Plan,
    prompts: Prompts,
    *,
    guidance_scale: float | None = None,
    max_sequence_length: int | None = None,
    seed: int = 0,
    prompts_per_run: int | None = None,
    progress: Progress | None = None,
) -> HeadErrors:
    """Run the plan and return, per step, module and head, its error against full attention.

    Both outputs come from the same live q, k, v, which the plan's own output has led to. Errors
    are told from a sample of rows, which is all of them up to plans.sample.SAMPLE_TOKENS.
    """
    scale = plan.sampler.guidance_scale if guidance_scale is None else guidance_scale
    settings = Denoising(
        prompts, plan.steps, plan.height, plan.width, scale, max_sequence_length, seed
    )
    effort = Effort(1, prompts_per_run or max(1, settings.pictures), False)
    runs = Runs(pipe, settings, effort, {}, progress or (lambda *_: None), Scratch(None, {}, False))
    return errors_by_module(plan.modules, runs.errors(plan, "measure"))


def measure_plan(
    pipe: Any,
    plan: Plan,
    prompts: Prompts,
    *,
    repair: bool = False,
    delta: float | None = None,
    cap_factor: float | None = None,
    error_weights: str | None = None,
    max_sequence_length: int | None = None,
    seed: int = 0,
    wanted: Wanted = BY_SIZE,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Run a plan that was carried or edited, and return it with what its heads err on record.

    repair: heads are raised, and the plan run again, until the bounds hold: delta and cap_factor.
    Errors are multiplied by error_weights, of a run in full here. All three are by default those
    that its record names. Raises ArrowheadError where the plan does not fit the pipeline, or is to
    be repaired within bounds that nobody names.
    """
    begin = time.perf_counter()
    settings = Denoising(prompts, plan.steps, plan.height, plan.width,
                         plan.sampler.guidance_scale, max_sequence_length, seed)  # fmt: skip
    before = plan.search or {}
    bounds = _bounds_of(before, delta, cap_factor, repair)
    weights = error_weights or before.get("error_weights", HEAD)
    bare = dense_plan_of(pipe, settings, plan.block, None, None)
    check_plan(plan, spec_of(bare), bare.sampler)
    effort = _effort(bare, settings, wanted, together=False)
    divisors = before.get("divisors", DIVISORS)
    arrows = {m.name: candidate_half_windows(m.layout, divisors) for m in plan.modules}
    search = Search(pipe, settings, bare, arrows, bounds, effort, None, progress,
                    weighing=weights)  # fmt: skip
    check_memory(search.memory(), pipe, announce)
    search.begin(Scratch(None, {}, False))
    found = search.repaired(plan) if repair else search.measured(plan)
    record = before | _run_record(pipe, settings, weights)
    record |= {"sample_tokens": effort.sample_tokens, "error_weights": weights}
    if bounds.delta < math.inf:
        record |= {"delta": bounds.delta, "cap_factor": bounds.cap_factor}
        record["within_bounds"] = not bounds.broken(plan.modules, found.errors)
    record.pop("prices", None)  # they were of the plan that the search found
    return _finished(found, record, begin)


def _bounds_of(
    record: Mapping[str, Any], delta: float | None, cap_factor: float | None, needed: bool
) -> Bounds:
    """Bounds as given, else as recorded, else none."""
    delta = record.get("delta") if delta is None else delta
    cap_factor = record.get("cap_factor", 1.5) if cap_factor is None else cap_factor
    if delta is None and needed:
        raise ArrowheadError(
            "bounds of the repair",
            got="no delta in the plan's record",
            expected="the error that each step and module may make",
            fix="pass --delta, from 0.2 on",
        )
    return Bounds(math.inf if delta is None else delta, cap_factor, record.get("method") == POOLED)


def _checked(
    settings: Denoising,
    delta: float,
    cap_factor: float,
    candidates: Sequence[str],
    method: str,
    max_buckets: int,
) -> str:
    """Return the method that is meant; raise ArrowheadError for what cannot be."""
    check_bucket_limit(max_buckets)
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
    return PROGRESSIVE if method == JOINT and max_buckets >= settings.steps else method


def _tried(
    plan: Plan, candidates: Sequence[str], divisors: Sequence[int], uncached: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Modes to try on each head of a module, FULL aside; some modules cache none."""
    tried = {m.name: _candidate_modes(m, candidates, divisors) for m in plan.modules}
    unknown = [name for name in uncached if name not in tried]
    if unknown:
        raise ArrowheadError(
            "attention modules without cached heads",
            got=", ".join(unknown),
            expected=f"some of {', '.join(list(tried)[:3])}, ...",
            fix="take the names that `arrowhead plan show` prints",
        )
    for name in uncached:
        tried[name] = tuple(mode for mode in tried[name] if mode != CACHED)
    return tried


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


def _run_record(pipe: Any, settings: Denoising, weights: str) -> dict[str, Any]:
    prompts: list[str] | str = f"{settings.pictures} precomputed embeddings"
    if not isinstance(settings.prompts, Mapping):
        prompts = list(settings.prompts)
    return {
        "metric": METRIC + ERROR_WEIGHTS[weights],
        "prompts": prompts,
        "seed": settings.seed,
        "guidance_scale": settings.guidance_scale,
        "max_sequence_length": settings.max_sequence_length,
        "device": str(getattr(pipe, "_execution_device", pipe.transformer.device)),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }
