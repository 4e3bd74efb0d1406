"""Decisions per layer, as DiTFastAttn (arXiv 2406.08552) takes them: for comparison.

All heads of a module share one mode at a step. Step by step, in execution order, each module takes
the mode that saves most of those whose errors, summed over its heads, keep the bound.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from plans.accounting import account
from plans.denoising import Denoising, denoise, dense_plan_of
from plans.models import AttentionModule
from plans.plan import Bucket, Plan
from plans.recorder import head_savings
from plans.strategies import ChooseHeads
from plans.tiles import CACHED, FULL, candidate_half_windows


class ChooseModules(ChooseHeads):
    """Score every candidate at every step but the first, and go on with each module's best."""

    def _choose(self, module: AttentionModule, scores: list[dict[int, float]]) -> Sequence[int]:
        savings = self.savings[module.name]
        best, saved = FULL, 0.0
        for mode in scores[0]:
            error = sum(head[mode] for head in scores)
            saving = sum(head[mode] for head in savings)
            if error <= self._delta and saving > saved:
                best, saved = mode, saving
        return (best,) * module.heads


def search_layerwise(
    pipe: object,
    settings: Denoising,
    *,
    delta: float,
    divisors: Sequence[int] = (8, 16, 32),
    block: int = 128,
    source: str | None = None,
    revision: str | None = None,
) -> Plan:
    """Search a plan with one mode per module and step; its errors sum to at most delta in each.

    Every step is a bucket of its own.
    """
    begin = time.perf_counter()
    bare = dense_plan_of(pipe, settings, block, source, revision)
    modes = {m.name: (*candidate_half_windows(m.layout, divisors), CACHED) for m in bare.modules}
    savings = {m.name: head_savings(m, modes[m.name]) for m in bare.modules}
    strategy = ChooseModules(bare.modules, modes, savings, delta, cap_factor=1.0)
    denoise(pipe, settings, bare.modules, strategy, lambda step: None)
    buckets = tuple(Bucket(dict(chosen)) for chosen in strategy.modes)
    plan = replace(bare, buckets=buckets, schedule=tuple(range(settings.steps)))
    record = {
        "method": "layerwise", "delta": delta, "divisors": list(divisors), "seed": settings.seed,
        "seconds": round(time.perf_counter() - begin, 3),
    }  # fmt: skip
    accounting = account(plan, batch=2 if plan.sampler.cfg else 1)
    return replace(plan, search=record, accounting=accounting)
