"""Modes and buckets under one bound for a whole run, in place of one for each step and module.

A bound for each step and module is spent there whether little is saved with it or much: a module
that one head's caches would serve well stops where its sum is full, and another fills its own with
heads that save little. Where all errors draw on one sum, one price of error serves all steps,
modules and heads: each takes the options that save more than they err at that price, and the price
is the least at which the sum is kept. A head's caches are chosen for the whole run at once: to
compute it at one step is what lets later steps read it.

Errors of a head are told from live q, k and v, which is not all that comes of them: a head that is
computed behind stale ones holds what it found there for as long as its own output is read. Errors
are spent where little is computed behind them (`reach`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from plans.buckets import Choice, Judge, check_bucket_limit, joined, predicted_errors
from plans.estimate import Flags, ages
from plans.refine import all_options
from plans.schedules import Progress, Schedule, climb, search_schedule
from plans.tables import Floats, HeadTables, Ints
from plans.tiles import CACHED, FULL

_HALVINGS = 32  # of the range of prices, in its logarithm
_SEARCHED = 60_000  # options times steps times heads that schedules are told apart by
_FEW = 150  # options, all tried; else about 3 * 2 ** (K - 1)
_LEAST = 4  # heads
_KICKS = 4
_BASE = 4  # buckets
_TURNS = 8  # of choices, each with the reach of errors under the one before
# Options that the default ones of a schedule are made with: caps so wide seldom keep one out.
_WIDE = 6.0


def choose_pooled(
    tables: HeadTables,
    delta: float,
    cap_factor: float,
    max_buckets: int,
    start: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Choose at most max_buckets buckets and a schedule that save much within one bound.

    delta: of the mean, over steps and modules, of the sum of a module's errors. Where error is
    spent is told by what comes of it (`reach`), in some turns, since that hangs on the choice. With
    a bucket for each step no schedule is searched; with fewer it is that of the first turn.
    cap_factor bounds nothing here: the arguments are those of choose_buckets. Deterministic.
    """
    check_bucket_limit(max_buckets)
    budget = delta * tables.steps * len(tables.heads)
    if max_buckets >= tables.steps:
        return joined(_settled(tables, budget, _each_step))
    first = _scheduled(tables, delta, max_buckets, start, progress)

    def choose(weighed: HeadTables, budget: float) -> Choice:
        return _PooledJudge(weighed, delta, budget).choose(first.schedule)

    return joined(_settled(tables, budget, choose))


def most_saved(tables: HeadTables, delta: float) -> float:
    """Return what no choice within the bound exceeds, with a bucket for each step.

    At any price, what is saved less what errors cost is at most what the cheapest modes make of it;
    the budget at that price added, it bounds what is saved (Lagrange's dual).
    """
    runs, budget = _Runs(tables), delta * tables.steps * len(tables.heads)
    bounds = []

    def cheapest(price: float) -> tuple[Ints, float]:
        modes, errors = runs.cheapest(price)
        bounds.append(runs.saved(modes) + price * (budget - errors))
        return modes, errors

    _at_least_price(cheapest, budget, runs.scale)
    return min(bounds)


def _each_step(tables: HeadTables, budget: float) -> Choice:
    """Choose each step's modes by themselves: the best at its price."""
    runs = _Runs(tables)
    modes, _ = _at_least_price(runs.cheapest, budget, runs.scale)
    codes = np.array([FULL, *tables.windows, CACHED])
    return Choice(codes[modes], tuple(range(tables.steps)), runs.saved(modes))


def _settled(
    tables: HeadTables, budget: float, choose: Callable[[HeadTables, float], Choice]
) -> Choice:
    """Choose with errors weighted by their reach under the choice before, until that settles.

    The weights say where error is spent; how much in all is the bound of the errors without them.
    """
    found = kept = choose(tables, budget)
    weights, room = np.ones(tables.arrow.shape[:2]), 1.0
    for turn in range(_TURNS):
        reached = reach(tables, found)
        weights = np.sqrt(weights * reached) if turn else reached
        weighed = replace(tables, weights=tables.weights * weights)
        plain = predicted_errors(tables, found).sum()
        share = predicted_errors(weighed, found).sum() / plain if plain else 1.0
        found = choose(weighed, budget * room * share)
        spent = predicted_errors(tables, found).sum()
        if spent <= budget:
            kept = found
        room *= budget / spent if spent else 1.0
    return kept


def reach(tables: HeadTables, choice: Choice) -> Floats:
    """Return how far an error of each step and head comes: 1 is the prediction of its own step.

    Heads of later modules that are computed at the step take it up, and hold it for as many steps
    as read their output; those that are cached do not see it. The mean over them, and over one
    module's worth of heads for the stream that carries the error past them all: [N, R].
    """
    cached = choice.modes[list(choice.schedule)] == CACHED
    steps, rows = cached.shape
    written = np.arange(steps)[:, None] - ages(cached[None])[0]
    served = np.zeros((steps, rows))
    np.add.at(served, (written, np.arange(rows)), 1)
    found = np.ones((steps, rows))
    for first, heads in zip(tables.starts, tables.heads, strict=True):
        later = served[:, first + heads :]
        mean = (heads + later.sum(axis=1)) / (heads + later.shape[1])
        found[:, first : first + heads] = mean[:, None]
    return found


def _scheduled(
    tables: HeadTables,
    delta: float,
    max_buckets: int,
    start: Sequence[int] | None,
    progress: Progress | None,
) -> Choice:
    """Find the schedule of at most max_buckets buckets that saves most, with modes."""
    budget = delta * tables.steps * len(tables.heads)
    whole = _PooledJudge(tables, delta, budget)
    heads = len(tables.arrow_saving)
    # Schedules are told apart by a sample of the heads, and by few options where there are many.
    options = whole.options_of(max_buckets)
    options = options if options <= _FEW else 3 * 2 ** (max_buckets - 1)
    taken = max(_LEAST, _SEARCHED // (tables.steps * options))
    rows = np.unique(np.linspace(0, heads - 1, min(heads, taken)).astype(int))
    judge = _PooledJudge(tables.of_rows(rows), delta, budget * len(rows) / heads, _FEW)
    report = progress or (lambda *_: None)
    fewer = None
    if start is not None:
        schedule = climb(judge.saving, tuple(start), max_buckets)
    else:
        if max_buckets > _BASE:  # where options are few again: more graphs begin from there
            fewer = _scheduled(tables, delta, _BASE, None, progress)
        begun = () if fewer is None else (fewer.schedule,)
        args = (judge.saving, tables.steps, max_buckets, report, begun, _KICKS)
        schedule = search_schedule(*args)
    found = joined(whole.choose(schedule))
    return found if fewer is None else max(found, fewer, key=lambda choice: choice.saving)


def _at_least_price(
    cheapest: Callable[[float], tuple[Ints, float]], budget: float, scale: float
) -> tuple[Ints, float]:
    """Return what is cheapest at the least price of error at which errors keep the budget."""
    low, high = np.log(scale) - 30, np.log(scale) + 30
    best = cheapest(float(np.exp(high)))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = cheapest(float(np.exp(middle)))
        if found[1] <= budget:
            best, high = found, middle
        else:
            low = middle
    return best


def _scale(savings: Floats, errors: Floats) -> float:
    """Return a price of error that is neither much too high nor too low."""
    usual = errors[np.isfinite(errors) & (errors > 0)]
    return float(savings.max() / np.median(usual)) if len(usual) and savings.max() > 0 else 1.0


class _Runs:
    """Each head's whole run as stretches of steps: computed in the first, cached in the rest."""

    def __init__(self, tables: HeadTables) -> None:
        steps, rows, windows = tables.arrow.shape
        shape = (steps, rows)
        self._weights = np.broadcast_to(tables.weights, shape)
        self._aging = self._weights * np.broadcast_to(tables.drift, shape)
        self._own = np.zeros((steps, windows + 1, rows))  # by step, mode, head; 0 is FULL
        self._own[:, 1:] = tables.arrow.transpose(0, 2, 1)
        self._aged = tables.cached.transpose(0, 2, 1)  # by step, age - 1, head
        self._saving = np.zeros((windows + 2, rows))  # the last is CACHED
        self._saving[1:-1] = tables.arrow_saving.T
        self._saving[-1] = tables.cached_saving
        self.scale = _scale(self._saving, np.concatenate([self._own, self._aged], axis=1))

    def saved(self, modes: Ints) -> float:
        """Return what modes [N, R] save, as indices: full, the windows, cached."""
        return float(self._saving[modes, np.arange(modes.shape[1])].sum())

    def cheapest(self, price: float) -> tuple[Ints, float]:
        """Return the modes [N, R] that cost least, errors at a price less savings; their errors."""
        steps, rows = self._weights.shape
        oldest, heads = self._aged.shape[1], np.arange(rows)
        cost = np.full((steps + 1, rows), np.inf)  # least, of all steps before one
        cost[0] = 0
        erred = np.zeros((steps + 1, rows))
        begun, taken = np.zeros((2, steps + 1, rows), dtype=int)
        for first in range(steps):
            errors = self._own[first] * self._weights[first]
            total = price * errors - self._saving[:-1]
            for end in range(first + 1, min(steps, first + 1 + oldest) + 1):
                if end > first + 1:
                    step = end - 1
                    more = self._own[first] + self._aged[step, step - first - 1]
                    more = more * self._aging[step]
                    errors, total = errors + more, total + price * more - self._saving[-1]
                mode = total.argmin(axis=0)
                reached = cost[first] + total[mode, heads]
                better = reached < cost[end]
                cost[end][better] = reached[better]
                erred[end][better] = (erred[first] + errors[mode, heads])[better]
                begun[end][better] = first
                taken[end][better] = mode[better]
        return _traced(begun, taken, len(self._saving) - 1), float(erred[-1].sum())


def _traced(begun: Ints, taken: Ints, cached: int) -> Ints:
    """Return modes [N, R] from where the stretch before each step began, and with which mode."""
    steps, rows = len(begun) - 1, begun.shape[1]
    modes = np.full((steps, rows), cached)
    heads, end = np.arange(rows), np.full(rows, steps)
    while (end > 0).any():
        open_, at = heads[end > 0], end[end > 0]
        first = begun[at, open_]
        modes[first, open_] = taken[at, open_]
        end[open_] = first
    return modes


class _PooledJudge(Judge):
    """Finds the best modes under a schedule where all errors draw on one sum."""

    def __init__(
        self, tables: HeadTables, delta: float, budget: float, most: int | None = None
    ) -> None:
        """most: options of a head up to which all are tried; by default what time allows."""
        super().__init__(tables, delta, _WIDE)
        self._budget, self._most = budget, most
        arrows = np.flatnonzero(np.isfinite(tables.arrow[0]).any(axis=0)) + 1
        self._first = (0, *arrows)

    def options_of(self, buckets: int) -> int:
        """Return how many options a head has in so many buckets, if it may be in any mode."""
        return len(self._first) * len(self._saving) ** (buckets - 1)

    def choose(self, schedule: Schedule, tried: Ints | None = None) -> Choice:
        """Return the best modes found: of every mode in every bucket, if those are not too many."""
        if tried is None and self.options_of(max(schedule) + 1) <= (self._most or np.inf):
            tried = all_options(len(self._saving), schedule, 1, self._first)
        return super().choose(schedule, tried)

    def allowed(self, errors: Floats) -> Flags:
        return np.asarray(np.isfinite(errors).all(axis=1))

    def within(self, savings: Floats, errors: Floats, in_pairs: bool) -> Ints:
        """Pick an option per head: most saving with the sum of all errors within the budget."""
        sums, rows = errors.sum(axis=1), np.arange(savings.shape[1])
        sums[~np.isfinite(savings)] = 0

        def cheapest(price: float) -> tuple[Ints, float]:
            picked = (savings - price * sums).argmax(axis=0)
            return picked, float(sums[picked, rows].sum())

        finite = np.where(np.isfinite(savings), savings, 0.0)
        picked, spent = _at_least_price(cheapest, self._budget, _scale(finite, sums))
        for row in rows:  # what room is left is used head by head
            room = self._budget - spent + sums[picked[row], row]
            gain = np.where(sums[:, row] <= room, savings[:, row], -np.inf)
            if gain.max() > savings[picked[row], row]:
                spent += sums[gain.argmax(), row] - sums[picked[row], row]
                picked[row] = gain.argmax()
        return picked
