"""What a plan saves and what its caches cost."""

from __future__ import annotations

from typing import Any

from plans.cache_flow import cache_flow
from plans.models import ModelSpec, transformer_flops
from plans.plan import Plan
from plans.tiles import CACHED, FULL, TokenLayout, kept_pairs


def account(plan: Plan, batch: int) -> dict[str, Any]:
    """Count a legal plan's work over all N steps, for transformer calls of `batch` rows.

    attention_flops_saved, per_step and paper_formula_saved are shares in 0..1 of dense attention;
    the first two count the block-defined set, text included. The transformer's FLOPs are None if
    the plan does not keep the model's config. cache_bytes: item size in bytes -> bytes.
    """
    kept = [_step_pairs(plan, step) for step in range(plan.steps)]
    full = batch * sum(
        module.heads * kept_pairs(module.layout, FULL, module.text_output)
        for module in plan.modules
    )
    flops = dense_flops = None
    if plan.model.config is not None:
        spec = ModelSpec(
            plan.model.architecture, plan.model.config, plan.height, plan.width, plan.text_tokens,
            plan.block, plan.modules,
        )  # fmt: skip
        of_bucket = [transformer_flops(spec, b.modes, batch)["total"] for b in plan.buckets]
        flops = sum(of_bucket[bucket] for bucket in plan.schedule)
        dense_flops = plan.steps * transformer_flops(spec, None, batch)["total"]
    return {
        "batch": batch,
        "attention_flops_saved": 1 - batch * sum(kept) / (plan.steps * full),
        "paper_formula_saved": _paper_formula(plan),
        "attention_pairs_kept": batch * sum(kept),
        "attention_pairs_full": plan.steps * full,
        "transformer_flops": flops,
        "transformer_flops_dense": dense_flops,
        "cache_bytes": {str(size): _cache_items(plan, batch) * size for size in (2, 4)},
        "per_step": [round(1 - batch * pairs / full, 6) for pairs in kept],
    }


def _step_pairs(plan: Plan, step: int) -> int:
    modes = plan.modes_at(step)
    return sum(
        kept_pairs(module.layout, mode, module.text_output)
        for module in plan.modules
        for mode in modes[module.name]
    )


def _cache_items(plan: Plan, batch: int) -> int:
    modules = {module.name: module for module in plan.modules}
    return batch * sum(
        len(group.heads) * modules[group.module].layout.seq_len * modules[group.module].head_dim
        for group in cache_flow(plan).groups
    )


def _paper_formula(plan: Plan) -> float:
    """Mean over steps and heads of the paper's own benefit: (V - w)^2 / (V + T)^2, cached 1."""
    total = count = 0.0
    for step in range(plan.steps):
        modes = plan.modes_at(step)
        for module in plan.modules:
            total += sum(_benefit(module.layout, mode) for mode in modes[module.name])
            count += module.heads
    return total / count


def _benefit(layout: TokenLayout, mode: int) -> float:
    if mode in (CACHED, FULL):
        return float(mode == CACHED)
    half_window = min(mode * layout.block, layout.image_tokens)
    return (layout.image_tokens - half_window) ** 2 / layout.seq_len**2
