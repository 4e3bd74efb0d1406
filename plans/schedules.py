"""Schedules, the bucket of every step, by local search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Schedule = tuple[int, ...]
Saving = Callable[[Schedule], float]
Progress = Callable[[int, int, float], None]  # rounds of local search done, of how many, saving


def search_schedule(
    saving: Saving,
    steps: int,
    buckets: int,
    progress: Progress,
    starts: Sequence[Schedule] = (),
    kicks: int = 6,
) -> Schedule:
    """Find a schedule that saves much: from several patterns, then from kicks of the best.

    Step 0 is in bucket 0. starts: schedules to begin from, too. kicks: restarts from the best
    schedule, some steps changed. saving is asked for many schedules, some of them again.
    Deterministic.
    """
    starts = list(dict.fromkeys([*_patterns(steps, buckets), *starts]))
    rounds = len(starts) + kicks
    best = starts[0]
    rng = np.random.default_rng(0)
    for turn in range(rounds):
        begin = starts[turn] if turn < len(starts) else _kicked(best, buckets, rng)
        found = climb(saving, begin, buckets)
        if saving(found) > saving(best):
            best = found
        progress(turn + 1, rounds, saving(best))
    return best


def climb(saving: Saving, schedule: Schedule, buckets: int) -> Schedule:
    """Change single steps, and swap neighbours, while that saves more."""
    improved = True
    while improved:
        improved = False
        for step in range(1, len(schedule)):
            best = max(_neighbours(schedule, step, buckets), key=saving, default=schedule)
            if saving(best) > saving(schedule):
                schedule, improved = best, True
    return schedule


def _patterns(steps: int, buckets: int) -> Iterator[Schedule]:
    """Yield schedules that refresh every few steps, some heads more often than others."""
    if buckets == 1:
        yield (0,) * steps
        return
    for period in (2, 3, 4, 6):
        often, seldom = buckets - 1, 1
        row = [0] + [seldom if step % period == 0 else often for step in range(1, steps)]
        for step in range(1, steps):
            if buckets > 3 and row[step] == often and step % period == period // 2:
                row[step] = 2
        yield tuple(row)
    yield tuple(min(step, step * buckets // steps) for step in range(steps))  # in runs


def _kicked(schedule: Schedule, buckets: int, rng: np.random.Generator) -> Schedule:
    row = list(schedule)
    for step in rng.integers(1, len(row), size=max(2, len(row) // 8)) if len(row) > 1 else ():
        row[step] = int(rng.integers(buckets))
    return tuple(row)


def _neighbours(schedule: Schedule, step: int, buckets: int) -> Iterator[Schedule]:
    here = schedule[step]
    for bucket in range(buckets):
        if bucket != here:
            yield (*schedule[:step], bucket, *schedule[step + 1 :])
    if step + 1 < len(schedule) and schedule[step + 1] != here:
        yield (*schedule[:step], schedule[step + 1], here, *schedule[step + 2 :])
