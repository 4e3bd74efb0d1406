"""Which mode each head takes: an exact knapsack per step and module, then steps into buckets."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from plans.errors import ArrowheadError
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


Table = Mapping[str, Candidates]  # per module


class Merged(NamedTuple):
    """Buckets (per module H modes) and the bucket of each step."""

    buckets: list[dict[str, tuple[int, ...]]]
    schedule: list[int]


def merge_steps(
    errors: Sequence[Table], savings: Table, delta: float, cap: float, max_buckets: int
) -> Merged:
    """Merge steps into at most max_buckets buckets, losing as little saving as possible.

    errors: per step, candidates as for choose_modes; step 0 is made full whatever they say.
    A bucket's modes keep every module of every one of its steps within delta and cap.
    """
    check_bucket_limit(max_buckets)
    full: Table = {module: [{} for _ in heads] for module, heads in savings.items()}
    merger = _Merger([full, *errors[1:]], savings, delta, cap)
    groups = merger.agglomerate([frozenset([step]) for step in range(len(errors))], max_buckets)
    groups = merger.refine(groups)
    buckets: list[dict[str, tuple[int, ...]]] = []
    schedule = [0] * len(errors)
    for group in sorted(groups, key=min):
        modes = merger.modes(group)
        if modes not in buckets:
            buckets.append(modes)
        for step in group:
            schedule[step] = buckets.index(modes)
    return Merged(buckets, schedule)


def check_bucket_limit(max_buckets: int) -> None:
    """Raise ArrowheadError unless there may be a bucket."""
    if max_buckets < 1:
        raise ArrowheadError(
            "number of buckets", got=max_buckets, expected="at least 1", fix="allow 2 or more"
        )


Group = frozenset[int]


class _Merger:
    def __init__(self, errors: Sequence[Table], savings: Table, delta: float, cap: float) -> None:
        # What is over the cap at one step is out for every group with that step.
        self._errors = [
            {
                module: [{m: e for m, e in head.items() if e < cap and m != FULL} for head in heads]
                for module, heads in table.items()
            }
            for table in errors
        ]
        self._savings = savings
        self._delta = delta
        self._cap = cap
        self._modes: dict[Group, dict[str, tuple[int, ...]]] = {}
        self._saved: dict[Group, float] = {}

    def modes(self, group: Group) -> dict[str, tuple[int, ...]]:
        """Return the modes that save most within the bounds at all the group's steps."""
        if group not in self._modes:
            self._modes[group] = {m: self._module_modes(m, group) for m in self._savings}
        return self._modes[group]

    def saved(self, group: Group) -> float:
        """Return the saving of the group's modes over its steps."""
        if group not in self._saved:
            per_step = sum(
                self._savings[module][head].get(mode, 0.0)
                for module, row in self.modes(group).items()
                for head, mode in enumerate(row)
                if mode != FULL
            )
            self._saved[group] = per_step * len(group)
        return self._saved[group]

    def _module_modes(self, module: str, group: Group) -> tuple[int, ...]:
        steps = [self._errors[step][module] for step in sorted(group)]
        # An error of a mode in a group is its largest; a mode unknown at one step is out.
        worst = [
            {mode: max(step[mode] for step in head) for mode in set.intersection(*map(set, head))}
            for head in zip(*steps, strict=True)
        ]
        savings = self._savings[module]
        modes = choose_modes(worst, savings, self._delta, self._cap)
        best = [max((savings[h].get(m, 0.0) for m in c), default=0.0) for h, c in enumerate(worst)]
        if any(
            b > savings[h].get(m, 0.0) for h, (b, m) in enumerate(zip(best, modes, strict=True))
        ):
            self._use_room(steps, worst, savings, modes)
        return tuple(modes)

    def _use_room(
        self, steps: Sequence[Candidates], worst: Candidates, savings: Candidates, modes: list[int]
    ) -> None:
        """Raise savings in place: largest errors may sum over delta where no single step's do."""
        sums = [sum(e[h].get(m, 0.0) for h, m in enumerate(modes)) for e in steps]
        for head, candidates in enumerate(worst):
            saving, now = savings[head], modes[head]
            better = [m for m in candidates if saving.get(m, 0.0) > saving.get(now, 0.0)]
            better.sort(key=lambda m, saving=saving: (-saving[m], m))  # type: ignore[misc]
            for mode in better:
                moved = [
                    total - step[head].get(now, 0.0) + step[head][mode]
                    for total, step in zip(sums, steps, strict=True)
                ]
                if max(moved) <= self._delta:
                    sums, modes[head] = moved, mode
                    break

    def agglomerate(self, groups: list[Group], max_buckets: int) -> list[Group]:
        """Join the pair of groups that loses least until few enough are left."""
        groups = list(groups)
        losses = {(a, b): self._loss(a, b) for i, a in enumerate(groups) for b in groups[i + 1 :]}
        while len(groups) > max_buckets:
            a, b = min(losses, key=lambda pair: (losses[pair], min(pair[0]), min(pair[1])))
            losses = {pair: loss for pair, loss in losses.items() if not {a, b} & set(pair)}
            groups = [group for group in groups if group not in (a, b)]
            losses.update({(other, a | b): self._loss(other, a | b) for other in groups})
            groups.append(a | b)
        return groups

    def _loss(self, a: Group, b: Group) -> float:
        return self.saved(a) + self.saved(b) - self.saved(a | b)

    def refine(self, groups: list[Group], passes: int = 5) -> list[Group]:
        """Move single steps to other groups while that saves more."""
        groups = sorted(groups, key=min)
        for _ in range(passes):
            before = list(groups)
            for step in range(1, len(self._errors)):
                groups = self._move(groups, step)
            if groups == before:
                break
        return groups

    def _move(self, groups: list[Group], step: int) -> list[Group]:
        home = next(group for group in groups if step in group)
        rest = home - {step}
        stay = self.saved(home) - (self.saved(rest) if rest else 0.0)
        others = [group for group in groups if group != home]
        gains = [self.saved(group | {step}) - self.saved(group) - stay for group in others]
        if not gains or max(gains) <= 1e-9:
            return groups
        target = others[gains.index(max(gains))]
        moved = {home: rest, target: target | {step}}
        return [new for group in groups if (new := moved.get(group, group))]
