"""What no choice of buckets can save more than: a graph for each step, modes free at every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plans.buckets import choose_buckets
from plans.tables import Floats, HeadTables, Ints

_ROUNDS = 60  # of prices for the modules' sums; the bound is about 0.1 % over its limit then


def per_step_bound(tables: HeadTables, delta: float, cap_factor: float) -> float:
    """Return an upper bound on the saving of any plan within the bounds, whatever its buckets.

    With a price on the errors of each step and module heads are independent, and each head's best
    sequence of modes is found exactly, step by step over the age of its cache and the mode that
    wrote it. Every set of prices bounds the saving (Lagrange); prices rise where sums are over
    delta. Where no sum is, the bound is met.
    """
    steps, rows, _ = tables.arrow.shape
    paths = _Paths(tables, np.repeat([cap_factor * delta / h for h in tables.heads], tables.heads))
    module = np.repeat(np.arange(len(tables.heads)), tables.heads)
    price = np.zeros((steps, len(tables.heads)))
    best = np.inf
    for turn in range(_ROUNDS):
        value, errors = paths.best(price[:, module])
        best = min(best, value + delta * float(price.sum()))
        excess = np.add.reduceat(errors, tables.starts, axis=1) / delta - 1 if delta else errors
        if not delta or (turn == 0 and excess.max() <= 0):
            break
        scale = float(tables.cached_saving.max(initial=0.0)) / delta
        price = np.maximum(0, price + scale / (2 + turn) * excess)
    return float(best)


def compare_buckets(
    tables: HeadTables,
    delta: float,
    cap_factor: float,
    counts: Sequence[int],
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Choose for every number of buckets: shares of what caches at every step would save.

    Predicted by the tables. "bound" is the share that a graph for each step could save at most,
    and "loss" the part of it that is lost.
    """
    most = np.concatenate([tables.arrow_saving, tables.cached_saving[:, None]], axis=1).max(axis=1)
    dense = tables.steps * float(most.sum()) or 1.0
    bound = per_step_bound(tables, delta, cap_factor) / dense
    rows = []
    for i, count in enumerate(counts):
        if progress is not None:
            progress(f"{count} graphs", i, len(counts))
        begin = time.perf_counter()
        choice = choose_buckets(tables, delta, cap_factor, count)
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
    return {"delta": delta, "cap_factor": cap_factor, "bound": bound, "rows": rows}


class _Paths:
    """Best sequences of modes, a head at a time; all heads side by side."""

    def __init__(self, tables: HeadTables, cap: Floats) -> None:
        steps, rows, windows = tables.arrow.shape
        ages = tables.cached.shape[2]
        # By step, mode (FULL last) and head; by step, age - 1, mode that wrote it and head.
        own = np.concatenate([tables.arrow, np.zeros((steps, rows, 1))], axis=2).transpose(0, 2, 1)
        self._own = np.where((own < cap) | (own == 0), own, np.inf)
        self._own[0, :-1] = np.inf
        self._aged = np.full((steps, ages, windows + 1, rows), np.inf)
        drift = np.broadcast_to(tables.drift, (steps, rows))
        for age in range(1, min(ages, steps - 1) + 1):
            errors = (tables.cached[age:, None, :, age - 1] + own[:-age]) * drift[age:, None]
            self._aged[age:, age - 1] = np.where((errors < cap) | (errors == 0), errors, np.inf)
        self._saving = np.zeros((windows + 1, rows))
        self._saving[:-1] = tables.arrow_saving.T
        self._cached_saving = tables.cached_saving

    def best(self, price: Floats) -> tuple[float, Floats]:
        """Return the most of saving less price x error, and the errors [N, R] of what saves it."""
        steps, kinds, rows = self._own.shape
        ages = self._aged.shape[1]
        value = np.full((ages + 1, kinds, rows), -np.inf)
        value[0, -1] = 0
        came = np.zeros((steps, rows), dtype=np.int64)
        for step in range(1, steps):
            flat = value.reshape(-1, rows)
            came[step] = flat.argmax(axis=0)
            before = flat[came[step], np.arange(rows)]
            grown = np.empty_like(value)
            grown[0] = before + self._saving - _cost(price[step], self._own[step])
            grown[1:] = value[:-1] + self._cached_saving - _cost(price[step], self._aged[step])
            value = grown
        flat = value.reshape(-1, rows)
        last = flat.argmax(axis=0)
        return float(flat[last, np.arange(rows)].sum()), self._walk(came, last)

    def _walk(self, came: Ints, state: Ints) -> Floats:
        """Follow the states back; errors [N, R]."""
        steps, kinds, rows = self._own.shape
        heads = np.arange(rows)
        errors = np.zeros((steps, rows))
        for step in range(steps - 1, 0, -1):
            age, kind = np.divmod(state, kinds)
            aged = (
                self._aged[step, np.maximum(age - 1, 0), kind, heads]
                if len(self._aged[0])
                else self._own[step, kind, heads]
            )
            errors[step] = np.where(age > 0, aged, self._own[step, kind, heads])
            state = np.where(age > 0, state - kinds, came[step])
        return errors


def _cost(price: Floats, errors: Floats) -> Floats:
    """Price times error; infinite errors cost infinitely much at any price."""
    return np.where(np.isfinite(errors), price * np.where(np.isfinite(errors), errors, 0), np.inf)
