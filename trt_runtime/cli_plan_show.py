"""A plan in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plans.accounting import account
from plans.cache_flow import oldest_caches
from plans.plan import Plan
from trt_runtime.cli_common import bytes_text, percent, show_table
from trt_runtime.plan_text import mode_counts, modes_text

_ROW = 120  # characters of a row of modes; longer ones are told as counts


def show_plan(plan: Plan, *, all_heads: bool = False) -> None:
    """Print modes, buckets and what the plan saves; heads by count where a row would not fit."""
    _show_modes(plan, all_heads)
    accounting = plan.accounting or account(plan, rows_of(plan))
    _show_buckets(plan, accounting)
    cfg = " with CFG" if plan.sampler.cfg else ""
    facts = [
        f"plan {plan.sha256[:12]} for {plan.model.source or 'a model without a source'}",
        f"{plan.model.architecture} {plan.height} x {plan.width}, {plan.text_tokens} text tokens, "
        f"blocks of {plan.block}, {plan.steps} steps of {plan.sampler.scheduler}, guidance "
        f"{plan.sampler.guidance_scale:g}{cfg}",
        f"attention saved: {percent(accounting['attention_flops_saved'])} "
        f"(paper's formula: {percent(accounting['paper_formula_saved'])}); "
        f"caches in fp16: {bytes_text(accounting['cache_bytes']['2'])}",
    ]
    flops, dense = accounting.get("transformer_flops"), accounting.get("transformer_flops_dense")
    if flops and dense:
        facts.append(
            f"transformer: {flops / 1e12:.3g} of {dense / 1e12:.3g} TFLOP, "
            f"{percent(1 - flops / dense)} saved"
        )
    print("\n".join([*facts, *carried_facts(plan), *_search_facts(plan.search)]))


def _show_modes(plan: Plan, all_heads: bool) -> None:
    buckets = range(len(plan.buckets))
    wide = sum(max(2 * module.heads for module in plan.modules) + 2 for _ in buckets) > _ROW
    counted = wide and not all_heads
    title = "modes of the heads: F full, C cached, else the half window in blocks"
    if counted:
        title += "; 8C: eight heads, 3x4: three with 4 blocks (--heads shows each)"
    rows = [
        (m.name, *(modes_text(plan.buckets[b].modes[m.name], counted=counted) for b in buckets))
        for m in plan.modules
    ]
    show_table(title, ("module", *(f"bucket {i}" for i in buckets)), rows)


def carried_facts(plan: Plan) -> list[str]:
    """Say where a carried plan comes from and what the rule changed."""
    origin = (plan.search or {}).get("carried_from")
    if origin is None:
        return []
    raised, retimed = origin["raised"], origin["retimed"]
    steps = f" ({' '.join(retimed)})" if retimed else ""
    return [
        f"carried from plan {origin['plan_sha256'][:12]}, {origin['steps']} steps at "
        f"{origin['height']} x {origin['width']}; since caches would be too old {len(raised)} "
        f"heads of buckets are computed, {len(retimed)} steps{steps} have another bucket"
    ]


def _search_facts(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return ["no record: nothing was measured of this plan; `arrowhead plan measure` does"]
    if record.get("method") == "synthetic":
        return ["synthetic: nothing was measured, good for speed alone"]
    errors = record.get("errors", {})
    if not errors:
        return ["errors not measured yet: `arrowhead plan measure`"]
    facts = [_worst(record, errors)]
    if "prices" in record:
        told = record["prices"]
        facts.append(
            f"attention and q, k, v as priced on {told['device']}: "
            f"{told['dense_ms'] - told['saved_ms']:.1f} of {told['dense_ms']:.1f} ms"
        )
    return facts


def _worst(record: dict[str, Any], errors: dict[str, list[float]]) -> str:
    """The largest error, where it is, and whether it keeps the bound."""
    worst, step, name = max(
        (error, -step, name) for name, row in errors.items() for step, error in enumerate(row)
    )
    delta, prompts = record.get("delta"), record.get("prompts")
    over = len({s for row in errors.values() for s, e in enumerate(row) if e > (delta or e)})
    kept = f", over delta at {over} steps" if over else ""
    if not over and record.get("within_bounds") is False:
        kept = ", a head over its cap"
    weights = record.get("error_weights", "head")
    weighted = "" if weights == "head" else f" (weights: {weights})"
    said = f"{len(prompts)} prompts" if isinstance(prompts, list) else prompts or "prompts unknown"
    return (
        f"search: delta {delta}, largest {record.get('basis', 'measured')} error of a step and "
        f"module {worst:.4g}{weighted} (step {-step}, {name}){kept}; {said}, "
        f"{record.get('seconds')} s"
    )


def _show_buckets(plan: Plan, accounting: dict[str, Any]) -> None:
    oldest = oldest_caches(plan)
    rows = []
    for bucket in range(len(plan.buckets)):
        counts = mode_counts(plan, bucket)
        steps = [step for step, own in enumerate(plan.schedule) if own == bucket]
        saved = accounting["per_step"][steps[0]]
        age = max((age for (own, _), age in oldest.items() if own == bucket), default=0)
        rows.append((bucket, _ranges(steps), *counts.values(), age or "-", percent(saved)))
    header = ("bucket", "steps", "full", "arrow", "cached", "oldest cache", "saved")
    show_table("buckets; the age of a cache is in steps", header, rows)


def _ranges(steps: Sequence[int]) -> str:
    """Write 0 2-5 7."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return " ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def rows_of(plan: Plan) -> int:
    """Rows of a transformer call for one picture, which accounting counts by default."""
    if plan.accounting is not None:
        return int(plan.accounting["batch"])
    return 2 if plan.sampler.cfg else 1
