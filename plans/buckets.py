"""Modes of every head in every bucket and the bucket of every step, chosen together.

The error of a cached head grows with its age, so what a bucket may cache depends on when the
schedule last refreshed it: given a schedule, the ages are known, heads are independent but for
their module's sum, and the best modes follow at once. Schedules are found by local search on an
estimate (plans.estimate), and judged with the modules' sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from plans.errors import ArrowheadError
from plans.estimate import Estimate, Flags, ages, subsets
from plans.refine import all_options, exchange_pairs
from plans.schedules import Progress, Schedule, climb, search_schedule
from plans.tables import Floats, HeadTables, Ints
from plans.tiles import CACHED, FULL

# Heads times sets of buckets up to which schedules are searched, and only improved on, by what they
# save exactly: some seconds on one core for either.
_SEARCHED, _CLIMBED = 512, 4096
_KICKS = 24  # restarts at most of an exact search; 6 where it takes longest
_REFINED = 3  # schedules whose modes are chosen with more care
_PRICE_STEPS = 16  # iterations that find what error costs in a module over its bound


class Choice(NamedTuple):
    """Modes [K, R] of each bucket and head, the bucket of each step, and what that saves."""

    modes: Ints
    schedule: tuple[int, ...]
    saving: float


def choose_buckets(
    tables: HeadTables,
    delta: float,
    cap_factor: float,
    max_buckets: int,
    start: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Choose at most max_buckets buckets and a schedule that save most within the bounds.

    Step 0 reads no cache, and takes arrows only where the tables give them a finite error there
    (`HeadTables.under`). At every step the errors of a module's heads sum to at most delta and each
    is under cap_factor * delta / H. start: a schedule to improve on, in place of a search from
    many. Deterministic. Raises ArrowheadError if there may be no bucket.
    """
    check_bucket_limit(max_buckets)
    judge = Judge(tables, delta, cap_factor)
    count = min(max_buckets, tables.steps)
    report = progress or (lambda *_: None)
    work = sum(tables.heads) << (count - 1)
    found = []
    if start is None or work > _SEARCHED:
        found = _candidates(tables, delta, cap_factor, count, start, report)
    if work <= _SEARCHED:
        if start is None:
            kicks = min(_KICKS, 6 * (_SEARCHED // max(1, work)))
            found.append(search_schedule(judge.saving, tables.steps, count, report, found, kicks))
        else:
            found.append(climb(judge.saving, tuple(start), count))
    elif work <= _CLIMBED:
        found += [climb(judge.saving, schedule, count) for schedule in dict.fromkeys(found)]
    best = sorted(dict.fromkeys(found), key=judge.saving, reverse=True)[:_REFINED]
    refined = [_refined(tables, delta, cap_factor, judge.choose(schedule)) for schedule in best]
    return joined(max(refined, key=lambda choice: choice.saving))


def _refined(tables: HeadTables, delta: float, cap_factor: float, choice: Choice) -> Choice:
    """Try every mode in every bucket, a module at a time (plans.refine); saves no less."""
    modes, saving, schedule = choice.modes.copy(), 0.0, choice.schedule
    for index, (first, heads) in enumerate(zip(tables.starts, tables.heads, strict=True)):
        judge = Judge(tables.of_module(index), delta, cap_factor)
        rows = slice(first, first + heads)
        saved = judge.saved(modes[:, rows], schedule)
        arrows = np.flatnonzero(np.isfinite(tables.arrow[0, rows]).any(axis=0)) + 1
        options = all_options(len(tables.windows) + 2, schedule, heads, (0, *arrows))
        if options is not None:
            found = judge.choose(schedule, options)
            if found.saving > saved:
                modes[:, rows], saved = found.modes, found.saving
        saving += saved
    return Choice(modes, schedule, saving)


def _candidates(
    tables: HeadTables,
    delta: float,
    cap_factor: float,
    buckets: int,
    start: Sequence[int] | None,
    report: Progress,
) -> list[Schedule]:
    """Find schedules that save much where only caps bind, and where narrower ones do.

    Sums over delta cost what narrower caps would: the more heads a module has, the less they bind.
    """
    found = [] if start is None else [tuple(start)]
    for factor in (cap_factor, (cap_factor + min(cap_factor, 1)) / 2):
        estimate = Estimate(tables, _caps(tables.heads, delta, factor))
        if start is None:
            found.append(search_schedule(estimate.saving, tables.steps, buckets, report))
        else:
            found.append(climb(estimate.saving, tuple(start), buckets))
    return found


def predicted_errors(tables: HeadTables, choice: Choice) -> Floats:
    """Return what the tables say that a choice errs, [N, R]."""
    return Judge(tables, 1.0, 1.0).errors_of(choice)


def corrected(tables: HeadTables, choice: Choice, measured: Floats) -> HeadTables:
    """Learn from a run of the choice by which factor its caches err more, or less; [N, R]."""
    modes = choice.modes[list(choice.schedule)]
    predicted = predicted_errors(tables, choice)
    ratio = np.ones_like(measured)
    known = (modes == CACHED) & (predicted > 0) & np.isfinite(predicted)
    np.divide(measured, predicted, out=ratio, where=known)
    return replace(tables, drift=ratio)


def _caps(heads: Sequence[int], delta: float, factor: float) -> Floats:
    """Bound of each head's error, [R]."""
    return np.repeat([factor * delta / own for own in heads], heads)


def joined(choice: Choice) -> Choice:
    """Make buckets of equal modes one, and number them as they come."""
    rows, index = np.unique(choice.modes[list(choice.schedule)], axis=0, return_inverse=True)
    order: dict[int, int] = {}
    schedule = tuple(order.setdefault(int(i), len(order)) for i in index.ravel())
    return choice._replace(modes=rows[list(order)], schedule=schedule)


def check_bucket_limit(max_buckets: int) -> None:
    """Raise ArrowheadError unless there may be a bucket."""
    if max_buckets < 1:
        raise ArrowheadError(
            "number of buckets", got=max_buckets, expected="at least 1", fix="allow 2 or more"
        )


class Judge:
    """Finds the best modes under a schedule."""

    def __init__(self, tables: HeadTables, delta: float, cap_factor: float) -> None:
        self._tables = tables
        self._delta = delta
        self._starts = tables.starts
        self._cap = _caps(tables.heads, delta, cap_factor)
        steps, rows, windows = tables.arrow.shape
        # By step, choice, head; FULL is choice 0 of what is computed, age 0 that of what is cached.
        self._own = np.zeros((steps, windows + 1, rows))
        self._own[:, 1:] = tables.arrow.transpose(0, 2, 1)
        self._aged = np.zeros((steps, tables.cached.shape[2] + 2, rows))
        self._aged[:, 1:-1] = tables.cached.transpose(0, 2, 1)
        self._aged[:, -1] = np.inf
        self._drift, self._weights = tables.drift, tables.weights
        self._saving = np.zeros((windows + 2, rows))  # the last is CACHED
        self._saving[1:-1] = tables.arrow_saving.T
        self._saving[-1] = tables.cached_saving
        self._known: dict[Schedule, float] = {}

    @property
    def steps(self) -> int:
        return self._tables.steps

    def saving(self, schedule: Schedule) -> float:
        """Return what the best modes save over all steps."""
        if schedule not in self._known:
            self._known[schedule] = self.choose(schedule).saving
        return self._known[schedule]

    def choose(self, schedule: Schedule, tried: Ints | None = None) -> Choice:
        """Return the best modes found under the schedule.

        tried: [P, K], what each head may do, for one module; by default a few good options.
        """
        plan = np.array(schedule)
        if tried is None:
            modes, errors = self._options(plan)
        else:
            modes = np.repeat(tried[:, :, None], len(self._cap), axis=2)
            errors = self._errors(modes, plan)
        shares = np.bincount(plan, minlength=modes.shape[1]).astype(float)
        rows = np.arange(modes.shape[2])
        savings = np.einsum("k,pkr->pr", shares, self._saving[modes, rows])
        savings[~self.allowed(errors)] = -np.inf
        picked = self.within(savings, errors, tried is not None)
        codes = np.array([FULL, *self._tables.windows, CACHED])
        return Choice(
            codes[modes[picked, :, rows]].T,
            schedule,
            float(savings[picked, rows].sum()),
        )

    def allowed(self, errors: Floats) -> Flags:
        """Say which options, of errors [P, N, R], heads may take: [P, R]."""
        return ((errors < self._cap) | (errors == 0)).all(axis=1)

    def within(self, savings: Floats, errors: Floats, in_pairs: bool) -> Ints:
        """Pick an option per head: most saving with the errors within the bound."""
        picked = self._within_sums(savings, errors)
        return exchange_pairs(savings, errors, picked, self._delta) if in_pairs else picked

    def saved(self, modes: Ints, schedule: Schedule) -> float:
        """Return what modes [K, R], in codes of the tables, save over all steps."""
        taken = self._indices(modes)[list(schedule)]
        return float(self._saving[taken, np.arange(modes.shape[1])].sum())

    def errors_of(self, choice: Choice) -> Floats:
        """Return what the tables say of a choice, [N, R]."""
        return self._errors(self._indices(choice.modes)[None], np.array(choice.schedule))[0]

    def _indices(self, modes: Ints) -> Ints:
        order = {mode: i for i, mode in enumerate((FULL, *self._tables.windows, CACHED))}
        return np.vectorize(order.__getitem__, otypes=[int])(modes)

    def _options(self, schedule: Ints) -> tuple[Ints, Floats]:
        """Return what a head may do in the K buckets: modes [P, K, R] and errors [P, N, R].

        The first is full everywhere. Else a head is cached in any set of buckets; where it is not
        it takes the arrow that saves most, or, where a cache is written, the widest, or none.
        """
        steps, buckets = len(schedule), int(schedule.max()) + 1
        narrow, wide = self._arrows(schedule, buckets)
        cached = subsets(buckets)
        skip = cached[:, schedule]
        young = ages(skip).max(axis=1) < self._aged.shape[1] - 1
        cached, skip = cached[young], skip[young]
        writes = np.zeros(cached.shape, dtype=bool)
        for step in range(steps - 1):
            writes[:, schedule[step]] |= ~skip[:, step] & skip[:, step + 1]
        last_code = self._saving.shape[0] - 1
        parts = [np.zeros((1, *narrow.shape), dtype=int)]
        for arrows in (narrow, wide, np.zeros_like(narrow)):
            reads = cached.any(axis=1) if arrows is not narrow else slice(None)
            computed = np.where(writes[reads][:, :, None], arrows, narrow)
            parts.append(np.where(cached[reads][:, :, None], last_code, computed))
        modes = np.concatenate(parts)
        return modes, self._errors(modes, schedule)

    def _errors(self, modes: Ints, schedule: Ints) -> Floats:
        """Return what options [P, K, R] err, [P, N, R]."""
        steps, rows = np.arange(len(schedule))[:, None], np.arange(modes.shape[2])
        taken = modes[:, schedule]
        age = ages(taken == len(self._saving) - 1)
        last = steps - age
        computed = np.take_along_axis(taken, last, axis=1)
        oldest = self._aged.shape[1] - 1
        errors = self._own[last, computed, rows] + self._aged[steps, np.minimum(age, oldest), rows]
        return np.where(age > 0, errors * self._drift, errors) * self._weights

    def _arrows(self, schedule: Ints, buckets: int) -> tuple[Ints, Ints]:
        """Return per bucket and head the arrow that saves most, and the widest; 0 where none may.

        Under the cap at all the bucket's steps; both [K, R].
        """
        shape = (buckets, self._own.shape[2])
        own = self._own * np.broadcast_to(self._weights, self._own[:, 0].shape)[:, None]
        narrow, wide = np.zeros(shape, dtype=int), np.zeros(shape, dtype=int)
        for bucket in range(buckets):
            steps = schedule == bucket
            if not steps.any():
                continue
            may = own[steps].max(axis=0) < self._cap
            may[0] = True
            narrow[bucket] = np.where(may, self._saving[:-1], -1).argmax(axis=0)
            wide[bucket] = np.where(may[-1], len(may) - 1, 0)
        return narrow, wide

    def _within_sums(self, savings: Floats, errors: Floats) -> Ints:
        """Pick an option per head: most saving with each module's errors within delta.

        Where the heads' best sum to too much, errors get a price per step that rises until they
        fit; what room is then left is used head by head.
        """
        rows = np.arange(savings.shape[1])
        picked = savings.argmax(axis=0)
        heads = np.array(self._tables.heads)
        over = self._sums(errors, picked).max(axis=0) > self._delta
        if not over.any():
            return picked
        mine = np.flatnonzero(np.repeat(over, heads))
        finite = np.where(np.isfinite(errors[:, :, mine]), errors[:, :, mine], 0.0)
        module = np.repeat(np.arange(len(heads)), heads)[mine]
        scale = savings[picked, rows][mine].max() / self._delta
        price = np.zeros((errors.shape[1], len(heads)))
        safe = np.zeros_like(picked)  # full: within any bound
        safe[~np.repeat(over, heads)] = picked[~np.repeat(over, heads)]
        best = np.full(len(heads), -1.0)
        trial = picked.copy()
        for turn in range(_PRICE_STEPS):
            excess = self._sums(errors, trial) / self._delta
            saved = np.add.reduceat(savings[trial, rows], self._starts)
            better = over & (excess.max(axis=0) <= 1) & (saved > best)
            best = np.where(better, saved, best)
            taken = np.repeat(better, heads)
            safe[taken] = trial[taken]
            price = np.maximum(0, price + scale / (2 + turn) * (excess - 1) * over)
            cost = np.einsum("ptr,tr->pr", finite, price[:, module])
            trial[mine] = (savings[:, mine] - cost).argmax(axis=0)
        return self._use_room(savings, errors, safe, mine)

    def _use_room(self, savings: Floats, errors: Floats, picked: Ints, rows: Ints) -> Ints:
        """Move single heads to options that save more while their module stays within delta."""
        module = np.repeat(np.arange(len(self._tables.heads)), self._tables.heads)
        sums = self._sums(errors, picked)
        for row in rows:
            moved = sums[:, module[row]] - errors[picked[row], :, row] + errors[:, :, row]
            fits = (moved <= self._delta).all(axis=1)
            gain = np.where(fits, savings[:, row], savings[picked[row], row])
            if gain.max() > savings[picked[row], row]:
                picked[row] = gain.argmax()
                sums[:, module[row]] = moved[picked[row]]
        return picked

    def _sums(self, errors: Floats, picked: Ints) -> Floats:
        """Return each step's and module's sum of errors, [N, modules]."""
        chosen = errors[picked, :, np.arange(len(picked))]
        return np.add.reduceat(chosen, self._starts, axis=0).T
