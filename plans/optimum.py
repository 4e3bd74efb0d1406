"""What no choice of buckets can save more than: a graph for each step, modes free at every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np

from plans.buckets import choose_buckets
from plans.pooled import choose_pooled, most_saved
from plans.tables import FIRST_STEPS, Floats, HeadTables, Ints

_SWEEPS = 4  # over the heads of a module
_ROUNDS = 60  # of prices for the modules' sums; the bound is about 0.1 % over its limit then


class PerStep(NamedTuple):
    """What a graph for each step saves: in a plan that was found, and in any at most."""

    reached: float
    bound: float


def per_step(tables: HeadTables, delta: float, cap_factor: float) -> PerStep:
    """Bracket the saving of the best plan within the bounds, whatever its buckets.

    With a price on the errors of each step and module heads are independent, and each head's best
    sequence of modes is found exactly, step by step over the age of its cache and the mode that
    wrote it. Every set of prices bounds the saving (Lagrange); prices rise where sums are over
    delta. From there heads are given, one after another, the best sequence within the room that
    the others leave.
    """
    steps, _, _ = tables.arrow.shape
    heads = np.array(tables.heads)
    paths = _Paths(tables, np.repeat(cap_factor * delta / heads, heads))
    module = np.repeat(np.arange(len(heads)), heads)
    price = np.zeros((steps, len(heads)))
    bound = np.inf
    for turn in range(_ROUNDS):
        values, errors = paths.best(price[:, module])
        bound = min(bound, float(values.sum()) + delta * float(price.sum()))
        excess = np.add.reduceat(errors, tables.starts, axis=1) / delta - 1 if delta else errors
        if not delta or (turn == 0 and excess.max() <= 0):
            break
        scale = float(tables.cached_saving.max(initial=0.0)) / delta
        price = np.maximum(0, price + scale / (2 + turn) * excess)
    return PerStep(_reached(paths, tables, errors, delta), float(bound))


def _reached(paths: _Paths, tables: HeadTables, errors: Floats, delta: float) -> float:
    """Make sequences of modes that err too much fit, and better, a head of each module at a time.

    A head takes no more than the others leave, nothing where they leave nothing: after one sweep
    all sums are within delta.
    """
    errors = errors.copy()
    values = np.zeros(errors.shape[1])
    starts, heads = tables.starts, np.array(tables.heads)
    for _ in range(_SWEEPS):
        for head in range(int(heads.max())):
            modules = np.flatnonzero(heads > head)
            rows = starts[modules] + head
            others = np.add.reduceat(errors, starts, axis=1)[:, modules] - errors[:, rows]
            # A hair less: summed in another order the errors must still fit.
            room = np.maximum(0, delta * (1 - 1e-9) - others)
            values[rows], errors[:, rows] = paths.of(rows).best(np.zeros_like(room), room)
    return float(values.sum())


def compare_buckets(
    tables: HeadTables,
    delta: float,
    cap_factor: float,
    counts: Sequence[int],
    first_steps: Sequence[str] = FIRST_STEPS,
    progress: Callable[[str, int, int], None] | None = None,
    method: str = "pooled",
) -> dict[str, Any]:
    """Choose for every number of buckets, under each rule for the first step: a curve each.

    method: "pooled", delta bounds the mean over steps and modules; "joint", each of them.

    Saved are shares of what caches at every step would save, predicted by the tables. "bound" is
    the share that a graph for each step could save at most under the same rule, and "loss" the part
    of it that is lost; "reached" and "loss_of_reached" are those of a plan that has a graph for
    each step.
    """
    curves = []
    for i, first_step in enumerate(first_steps):

        def advance(count: int, done: int, rule: str = first_step, before: int = i) -> None:
            if progress is not None:
                whole = len(counts) * len(first_steps)
                progress(f"first step {rule}, {count} graphs", before * len(counts) + done, whole)

        curve = _curve(tables.under(first_step), delta, cap_factor, counts, advance, method)
        curves.append({"first_step": first_step} | curve)
    return {"method": method, "delta": delta, "cap_factor": cap_factor, "curves": curves}


def _curve(
    tables: HeadTables,
    delta: float,
    cap_factor: float,
    counts: Sequence[int],
    advance: Callable[[int, int], None],
    method: str,
) -> dict[str, Any]:
    """Choose for every number of buckets from tables under one rule."""
    pooled = method == "pooled"
    choose = choose_pooled if pooled else choose_buckets
    most = np.concatenate([tables.arrow_saving, tables.cached_saving[:, None]], axis=1).max(axis=1)
    dense = tables.steps * float(most.sum()) or 1.0
    if pooled:
        reached = choose(tables, delta, cap_factor, tables.steps).saving / dense
        bound = most_saved(tables, delta) / dense
    else:
        reached, bound = (saving / dense for saving in per_step(tables, delta, cap_factor))
    rows: list[dict[str, Any]] = []
    for i, count in enumerate(counts):
        advance(count, i)
        begin = time.perf_counter()
        choice = choose(tables, delta, cap_factor, count)
        saved = choice.saving / dense
        rows.append(
            {
                "max_buckets": count,
                "saved": saved,
                "loss": 1 - saved / bound if bound else 0.0,
                "seconds": round(time.perf_counter() - begin, 3),
                "schedule": list(choice.schedule),
            }
        )
    reached = max([reached, *(row["saved"] for row in rows)])
    for row in rows:
        row["loss_of_reached"] = 1 - row["saved"] / reached if reached else 0.0
    return {"reached": reached, "bound": bound, "rows": rows}


class _Paths:
    """Best sequences of modes, a head at a time; all heads side by side."""

    def __init__(self, tables: HeadTables, cap: Floats) -> None:
        steps, rows, windows = tables.arrow.shape
        ages = tables.cached.shape[2]
        # By step, mode (FULL last) and head; by step, age - 1, mode that wrote it and head.
        own = np.concatenate([tables.arrow, np.zeros((steps, rows, 1))], axis=2).transpose(0, 2, 1)
        weights = np.broadcast_to(tables.weights, (steps, rows))[:, None]
        weighted = own * weights
        self._own = np.where((weighted < cap) | (weighted == 0), weighted, np.inf)
        self._aged = np.full((steps, ages, windows + 1, rows), np.inf)
        factor = np.broadcast_to(tables.drift, (steps, rows))[:, None] * weights
        for age in range(1, min(ages, steps - 1) + 1):
            errors = (tables.cached[age:, None, :, age - 1] + own[:-age]) * factor[age:]
            self._aged[age:, age - 1] = np.where((errors < cap) | (errors == 0), errors, np.inf)
        self._saving = np.zeros((windows + 1, rows))
        self._saving[:-1] = tables.arrow_saving.T
        self._cached_saving = tables.cached_saving

    def of(self, rows: Ints) -> _Paths:
        """Return these heads' alone."""
        some = copy(self)
        some._own, some._aged = self._own[..., rows], self._aged[..., rows]
        some._saving, some._cached_saving = self._saving[:, rows], self._cached_saving[rows]
        return some

    def best(self, price: Floats, room: Floats | None = None) -> tuple[Floats, Floats]:
        """Return the most of saving less price x error, [R], and its errors [N, R].

        room: [N, R], what a head may err at most.
        """
        room = np.full_like(price, np.inf) if room is None else room
        steps, kinds, rows = self._own.shape
        ages = self._aged.shape[1]
        value = np.full((ages + 1, kinds, rows), -np.inf)
        value[0] = self._saving - _cost(price[0], self._own[0], room[0])
        came = np.zeros((steps, rows), dtype=np.int64)
        for step in range(1, steps):
            flat = value.reshape(-1, rows)
            came[step] = flat.argmax(axis=0)
            before = flat[came[step], np.arange(rows)]
            grown = np.empty_like(value)
            grown[0] = before + self._saving - _cost(price[step], self._own[step], room[step])
            grown[1:] = (
                value[:-1] + self._cached_saving - _cost(price[step], self._aged[step], room[step])
            )
            value = grown
        flat = value.reshape(-1, rows)
        last = flat.argmax(axis=0)
        return flat[last, np.arange(rows)], self._walk(came, last)

    def _walk(self, came: Ints, state: Ints) -> Floats:
        """Follow the states back; errors [N, R]."""
        steps, kinds, rows = self._own.shape
        heads = np.arange(rows)
        errors = np.zeros((steps, rows))
        for step in range(steps - 1, -1, -1):
            age, kind = np.divmod(state, kinds)
            aged = (
                self._aged[step, np.maximum(age - 1, 0), kind, heads]
                if len(self._aged[0])
                else self._own[step, kind, heads]
            )
            errors[step] = np.where(age > 0, aged, self._own[step, kind, heads])
            state = np.where(age > 0, state - kinds, came[step])
        return errors


def _cost(price: Floats, errors: Floats, room: Floats) -> Floats:
    """Price times error; errors that are infinite, or over room, cost infinitely much."""
    may = np.isfinite(errors) & (errors <= room)
    return np.where(may, price * np.where(may, errors, 0), np.inf)
