"""How much error a plan may make, and raising the heads that make more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from plans.models import AttentionModule
from plans.plan import Bucket, Plan, join_equal
from plans.strategies import HeadErrors
from plans.tiles import FULL


class Bounds(NamedTuple):
    """Of a module's errors at a step: their sum, and a head's share times the head count."""

    delta: float
    cap_factor: float

    def cap(self, module: AttentionModule) -> float:
        """Return the bound of each of a module's heads."""
        return self.cap_factor * self.delta / module.heads

    def broken(self, modules: Sequence[AttentionModule], errors: HeadErrors) -> bool:
        """Whether any sum or head is over its bound at any step."""
        return any(
            sum(row[m.name]) > self.delta or max(row[m.name]) > self.cap(m)
            for row in errors
            for m in modules
        )


def raise_offenders(
    plan: Plan,
    errors: HeadErrors,
    bounds: Bounds,
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
            cap = bounds.cap(module)
            while live and (total > bounds.delta or own[live[-1]] > cap):
                head = live.pop()
                total = sum(own[h] for h in live)
                raised.add((bucket, module.name, head))
    for bucket, name, head in raised:
        arrows = [mode for mode in (candidates or {}).get(name, ()) if mode >= 0]
        mode = tables[bucket][name][head]
        widest = max(arrows, default=FULL)
        tables[bucket][name][head] = widest if mode < widest else FULL
    buckets = tuple(Bucket({name: tuple(modes) for name, modes in t.items()}) for t in tables)
    return join_equal(replace(plan, buckets=buckets))
