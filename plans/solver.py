"""Which mode each head of a module takes at one step: an exact knapsack."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from plans.tiles import FULL

# Savings are compared as integers, so that equal sums tie whatever the order of summing.
_UNITS = 1 << 40

Candidates = Sequence[Mapping[int, float]]  # per head: mode -> error or saving


class _Item(NamedTuple):
    error: float
    saving: int
    mode: int


class _State(NamedTuple):
    error: float
    saving: int
    mode: int  # of the last head chosen
    before: _State | None


def choose_modes(errors: Candidates, savings: Candidates, delta: float, cap: float) -> list[int]:
    """Choose each head's mode: most saving with sum of errors <= delta, each error < cap.

    errors and savings: per head, candidate mode -> relative squared error, saving. A head takes
    FULL (error 0, saving 0) if none of its candidates. Exact; ties go to the smaller total error.
    """
    top = max((s for head in savings for s in head.values()), default=0.0)
    if top <= 0:
        return [FULL] * len(errors)
    heads = [_items(e, s, cap, top) for e, s in zip(errors, savings, strict=True)]
    best_items = [items[-1] if items else _Item(0.0, 0, FULL) for items in heads]
    if sum(item.error for item in best_items) <= delta:
        return [item.mode for item in best_items]
    bound = _SuffixBound(heads)
    floor = bound.greedy(delta)
    states = [_State(0.0, 0, FULL, None)]  # errors and savings both strictly rising
    for head, items in enumerate(heads):
        grown = [_State(s.error, s.saving, FULL, s) for s in states]
        grown += [
            _State(s.error + item.error, s.saving + item.saving, item.mode, s)
            for item in items
            for s in states
            if s.error + item.error <= delta
        ]
        grown.sort(key=lambda state: (state.error, -state.saving))
        states, best = [], -1
        for state in grown:
            if state.saving > best:
                best = state.saving
                if best + bound(head + 1, delta - state.error) >= floor:
                    states.append(state)
    return _trace(states[-1])


def _items(
    errors: Mapping[int, float], savings: Mapping[int, float], cap: float, top: float
) -> list[_Item]:
    """One head's candidates within the cap that no other beats, errors and savings rising."""
    found = [
        _Item(error, round(savings[mode] / top * _UNITS), mode)
        for mode, error in errors.items()
        if mode != FULL and error < cap
    ]
    found.sort(key=lambda item: (item.error, -item.saving, item.mode))
    kept: list[_Item] = []
    for item in found:
        if item.saving > (kept[-1].saving if kept else 0):
            kept.append(item)
    return kept


def _trace(state: _State) -> list[int]:
    modes = []
    while state.before is not None:
        modes.append(state.mode)
        state = state.before
    return modes[::-1]


class _SuffixBound:
    """Linear-programming bound on the saving of heads i.. within an error budget."""

    def __init__(self, heads: Sequence[Sequence[_Item]]) -> None:
        # Steps (error, saving, head) along each head's convex hull, least error per saving first.
        # The running maximum keeps one head's steps in order where rounding would swap them.
        ordered = []
        for head, items in enumerate(heads):
            price = 0.0
            for index, (error, saving) in enumerate(_hull_steps(items)):
                price = max(price, error / saving)
                ordered.append((price, head, index, error, saving))
        self._steps = [(error, saving, head) for _, head, _, error, saving in sorted(ordered)]
        self._tables = []
        for first in range(len(heads) + 1):
            steps = [step for step in self._steps if step[2] >= first]
            errors = list(accumulate((step[0] for step in steps), initial=0.0))
            savings = list(accumulate((step[1] for step in steps), initial=0))
            self._tables.append((errors, savings))

    def __call__(self, first: int, budget: float) -> float:
        errors, savings = self._tables[first]
        full = bisect_right(errors, budget) - 1
        if full == len(errors) - 1:
            return savings[full]
        share = (budget - errors[full]) / (errors[full + 1] - errors[full])
        # One unit per thousand million of slack keeps rounding from cutting an optimum off.
        return savings[full] + share * (savings[full + 1] - savings[full]) + _UNITS * 1e-9

    def greedy(self, delta: float) -> int:
        """Return the saving of one feasible choice: the hull's steps taken while they fit."""
        spent, saved = 0.0, 0
        stuck: set[int] = set()
        for error, saving, head in self._steps:
            # A hair under delta: summed in another order the errors must still fit.
            if head not in stuck and spent + error <= delta * (1 - 1e-9):
                spent, saved = spent + error, saved + saving
            else:
                stuck.add(head)
        return saved


def _hull_steps(items: Sequence[_Item]) -> list[tuple[float, int]]:
    hull: list[tuple[float, int]] = [(0.0, 0)]
    for item in items:
        point = (item.error, item.saving)
        while len(hull) > 1 and _not_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(hull, hull[1:], strict=False)]


def _not_above(a: tuple[float, int], b: tuple[float, int], c: tuple[float, int]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])
