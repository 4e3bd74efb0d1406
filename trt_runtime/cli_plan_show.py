"""A plan in the terminal."""

from __future__ import annotations

from typing import Any

from plans.accounting import account
from plans.plan import Plan
from trt_runtime.cli_common import bytes_text, percent, show_table
from trt_runtime.plan_text import mode_counts, mode_name


def show_plan(plan: Plan) -> None:
    """Print modes, buckets and what the plan saves."""
    heads = {m.name: m.heads for m in plan.modules}
    rows = [
        (name, *(" ".join(mode_name(m, short=True) for m in b.modes[name]) for b in plan.buckets))
        for name in heads
    ]
    show_table(
        "modes of the heads: F full, C cached, else the half window in blocks",
        ("module", *(f"bucket {i}" for i in range(len(plan.buckets)))),
        rows,
    )
    accounting = plan.accounting or account(plan, rows_of(plan))
    _show_buckets(plan, accounting)
    facts = [
        f"{plan.model.architecture} {plan.height} x {plan.width}, {plan.text_tokens} text tokens, "
        f"blocks of {plan.block}, {plan.steps} steps of {plan.sampler.scheduler}",
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
    print("\n".join([*facts, *_search_facts(plan.search)]))


def _search_facts(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return []
    if record.get("method") == "synthetic":
        return ["synthetic: nothing was measured, good for speed alone"]
    worst = max((max(row) for row in record.get("errors", {}).values()), default=0.0)
    facts = [
        f"search: delta {record.get('delta')}, largest {record.get('basis', 'measured')} error of "
        f"a step and module {worst:.4g}, {record.get('seconds')} s"
    ]
    if "prices" in record:
        told = record["prices"]
        facts.append(
            f"attention and q, k, v as priced on {told['device']}: "
            f"{told['dense_ms'] - told['saved_ms']:.1f} of {told['dense_ms']:.1f} ms"
        )
    return facts


def _show_buckets(plan: Plan, accounting: dict[str, Any]) -> None:
    rows = []
    for bucket in range(len(plan.buckets)):
        counts = mode_counts(plan, bucket)
        steps = [step for step, own in enumerate(plan.schedule) if own == bucket]
        saved = accounting["per_step"][steps[0]]
        rows.append((bucket, " ".join(map(str, steps)), *counts.values(), percent(saved)))
    show_table("buckets", ("bucket", "steps", "full", "arrow", "cached", "saved"), rows)


def rows_of(plan: Plan) -> int:
    """Rows of a transformer call for one picture, which accounting counts by default."""
    if plan.accounting is not None:
        return int(plan.accounting["batch"])
    return 2 if plan.sampler.cfg else 1
