"""How much error a plan may make, and raising the heads that make more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from plans.estimate import ages
from plans.models import AttentionModule
from plans.plan import Bucket, Plan, join_equal
from plans.strategies import HeadErrors
from plans.tables import Floats
from plans.tiles import CACHED, FULL, kept_pairs


class Bounds(NamedTuple):
    """Of a module's errors at a step: their sum, and a head's share times the head count.

    pooled: delta bounds the mean of the sums over all steps and modules instead, and nothing else.
    """

    delta: float
    cap_factor: float
    pooled: bool = False

    def cap(self, module: AttentionModule) -> float:
        """Return the bound of each of a module's heads."""
        return self.cap_factor * self.delta / module.heads

    def excess(self, module: AttentionModule, errors: Floats) -> Floats:
        """Return by how much a module's errors [N, H] are over a bound at each step, else 0."""
        sums, most = errors.sum(axis=1), errors.max(axis=1)
        return np.maximum(sums - self.delta, most - self.cap(module)).clip(min=0)

    def broken(self, modules: Sequence[AttentionModule], errors: HeadErrors) -> bool:
        """Whether any sum or head is over its bound at any step; pooled, whether the mean is."""
        if self.pooled:
            return self.share(errors) > 1
        return any(self.excess(m, np.array([row[m.name] for row in errors])).any() for m in modules)

    def share(self, errors: HeadErrors) -> float:
        """Return the mean sum of a step's and module's errors, of delta."""
        sums = [sum(heads) for row in errors for heads in row.values()]
        return sum(sums) / (len(sums) * self.delta) if any(sums) else 0.0

    def raising(self, found: Mapping[str, Floats]) -> Bounds | Most:
        """Return what heads are held to one by one so that errors, by module [N, H], are within."""
        if not self.pooled:
            return self
        errors = np.sort(np.concatenate([table.ravel() for table in found.values()]))
        steps = len(next(iter(found.values())))
        kept = np.searchsorted(errors.cumsum(), self.delta * steps * len(found), side="right")
        return Most(float(errors[kept - 1]) if kept else 0.0)


class Most(NamedTuple):
    """One bound for every head's error."""

    error: float

    def excess(self, module: AttentionModule, errors: Floats) -> Floats:
        """Return by how much the largest of a module's errors [N, H] is over at each step."""
        return (errors.max(axis=1) - self.error).clip(min=0)


def raise_offenders(
    plan: Plan,
    errors: HeadErrors,
    bounds: Bounds,
    candidates: Mapping[str, Sequence[int]] | None,
) -> Plan:
    """Raise heads, or give steps another bucket, where measured errors break the bounds.

    A raised head goes from CACHED to the widest way in which other buckets compute it, since an
    arrow that none takes may err more than an old cache; from a narrow arrow to the widest, and
    from there to FULL; without candidates straight to FULL. A step takes a bucket without cached
    heads, all full or used before and after it, where that costs less than to raise its heads at
    all steps of their bucket. What is raised counts as error 0, and so does what reads a cache that
    became younger: the next run tells what these err.
    """
    found = {m.name: np.array([row[m.name] for row in errors]) for m in plan.modules}
    ladder = _Ladder(plan, candidates)
    held = bounds.raising(found)
    plan = _retimed(plan, found, held, ladder)
    tables = [{name: list(modes) for name, modes in b.modes.items()} for b in plan.buckets]
    for module in plan.modules:
        for bucket, head in _offenders(plan, module, found[module.name], held):
            mode = tables[bucket][module.name][head]
            tables[bucket][module.name][head] = ladder.above(module, head, mode)
    used = sorted(set(plan.schedule))
    buckets = tuple(Bucket({n: tuple(modes) for n, modes in tables[b].items()}) for b in used)
    schedule = tuple(used.index(bucket) for bucket in plan.schedule)
    return join_equal(replace(plan, buckets=buckets, schedule=schedule))


class _Ladder:
    """What a raised head becomes, and what a mode costs."""

    def __init__(self, plan: Plan, candidates: Mapping[str, Sequence[int]] | None) -> None:
        self._plan = plan
        self._candidates = candidates

    def above(self, module: AttentionModule, head: int, mode: int) -> int:
        """Return the mode that a head of this mode is raised to."""
        if self._candidates is None:
            return FULL
        if mode == CACHED:
            return widest_way(self._plan, module.name, head)
        widest = max((w for w in self._candidates[module.name] if w >= 0), default=FULL)
        return widest if mode < widest else FULL

    def raised_cost(self, module: AttentionModule, head: int, bucket: int) -> int:
        """Return the query/key pairs that raising a head of a bucket costs at a step."""
        mode = self._plan.buckets[bucket].modes[module.name][head]
        pairs = [
            kept_pairs(module.layout, m, module.text_output)
            for m in (self.above(module, head, mode), mode)
        ]
        return pairs[0] - pairs[1]

    def kept(self, bucket: int) -> int:
        """Return the query/key pairs that a step of a bucket computes."""
        return sum(
            kept_pairs(m.layout, mode, m.text_output)
            for m in self._plan.modules
            for mode in self._plan.buckets[bucket].modes[m.name]
        )


def _retimed(plan: Plan, errors: dict[str, Floats], bounds: Bounds | Most, ladder: _Ladder) -> Plan:
    """Give broken steps buckets without caches where that is cheaper; clears their errors."""
    computing = [
        b for b, bucket in enumerate(plan.buckets)
        if all(mode != CACHED for modes in bucket.modes.values() for mode in modes)
    ]  # fmt: skip
    before = {m.name: ages(_cached(plan, m)[None]) for m in plan.modules}
    full = plan.full_bucket
    for step, bucket in enumerate(plan.schedule):
        cost = plan.schedule.count(bucket) * sum(
            ladder.raised_cost(module, head, bucket)
            for module in plan.modules
            for head in _over(module, errors[module.name][step], bounds)
        )
        others = [
            b for b in computing
            if b == full or b in plan.schedule[:step] and b in plan.schedule[step + 1 :]
        ]  # fmt: skip
        if not cost or bucket in computing or not others:
            continue
        other = min(others, key=ladder.kept)
        if ladder.kept(other) - ladder.kept(bucket) >= cost:
            continue
        plan = replace(plan, schedule=(*plan.schedule[:step], other, *plan.schedule[step + 1 :]))
        for module in plan.modules:
            younger = ages(_cached(plan, module)[None]) < before[module.name]
            errors[module.name][younger[0]] = 0
            errors[module.name][step] = 0
    return plan


def _over(module: AttentionModule, errors: Floats, bounds: Bounds | Most) -> Iterator[int]:
    """Yield a module's heads to raise, largest error [H] first, until the others are in bounds."""
    errors = errors.copy()
    while bounds.excess(module, errors[None]).any():
        head = int(errors.argmax())
        yield head
        errors[head] = 0


def _cached(plan: Plan, module: AttentionModule) -> NDArray[np.bool_]:
    """Say which heads read a cache at each step, [N, H]."""
    return np.array([plan.modes_at(s)[module.name] for s in range(plan.steps)]) == CACHED


def widest_way(plan: Plan, module: str, head: int) -> int:
    """Return how a plan computes a head where it does: its widest mode, all-full buckets aside."""
    ways = [
        bucket.modes[module][head]
        for bucket in plan.buckets
        if any(mode != FULL for modes in bucket.modes.values() for mode in modes)
    ]
    arrows = [mode for mode in ways if mode >= 0]
    return FULL if FULL in ways or not arrows else max(arrows)


def _offenders(
    plan: Plan, module: AttentionModule, errors: Floats, bounds: Bounds | Most
) -> Iterator[tuple[int, int]]:
    """Yield buckets and heads to raise until no error [N, H] that still counts is over a bound."""
    schedule, cached = np.array(plan.schedule), _cached(plan, module)
    age, errors = ages(cached[None]), errors.copy()
    while True:
        excess = bounds.excess(module, errors)
        step = int(excess.argmax())
        if not excess[step]:
            return
        head = int(errors[step].argmax())
        yield int(schedule[step]), head
        steps = schedule == schedule[step]
        cached[steps, head] = False
        errors[steps, head] = 0
        errors[(ages(cached[None]) < age)[0]] = 0
