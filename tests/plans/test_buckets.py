"""Buckets and schedules: within every bound, best for their schedule, caches refreshed in time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.buckets import Choice, HeadTables, choose_buckets
from plans.errors import ArrowheadError
from plans.tiles import CACHED, FULL

WINDOWS = (1, 4)
SAVING = {FULL: 0.0, 1: 0.9, 4: 0.6, CACHED: 1.0}


def _tables(steps: int, heads: Sequence[int], ages: int, seed: int) -> HeadTables:
    """Make errors that fall with the window and rise with age, as real ones do."""
    rng = np.random.default_rng(seed)
    rows = sum(heads)
    arrow = np.sort(10 ** rng.uniform(-3, 0, (steps, rows, len(WINDOWS))), axis=2)[:, :, ::-1]
    cached = np.cumsum(10 ** rng.uniform(-3, -0.5, (steps, rows, ages)), axis=2)
    for step in range(steps):
        cached[step, :, step:] = np.inf
    return HeadTables(
        heads=tuple(heads),
        windows=WINDOWS,
        arrow=arrow,
        cached=cached,
        arrow_saving=np.tile([SAVING[w] for w in WINDOWS], (rows, 1)),
        cached_saving=np.full(rows, SAVING[CACHED]),
    )


def _errors(tables: HeadTables, modes: np.ndarray, schedule: Sequence[int]) -> np.ndarray:
    """Walk the steps of a choice: what each head errs, [N, R]."""
    errors = np.zeros((tables.steps, modes.shape[1]))
    drift = np.broadcast_to(tables.drift, errors.shape)
    for row in range(modes.shape[1]):
        written, of_write = 0, 0.0
        for step, bucket in enumerate(schedule):
            mode = modes[bucket, row]
            if mode == CACHED:
                age = step - written
                aged = (
                    tables.cached[step, row, age - 1] if age <= tables.cached.shape[2] else np.inf
                )
                errors[step, row] = (aged + of_write) * drift[step, row]
            else:
                own = 0.0 if mode == FULL else tables.arrow[step, row, WINDOWS.index(mode)]
                errors[step, row] = of_write = own
                written = step
    return errors


def _legal(tables: HeadTables, errors: np.ndarray, delta: float, cap_factor: float) -> bool:
    first = 0
    for heads in tables.heads:
        own = errors[:, first : first + heads]
        cap = cap_factor * delta / heads
        if (own.sum(axis=1) > delta + 1e-12).any() or ((own >= cap) & (own > 0)).any():
            return False
        first += heads
    return True


def _saved(choice: Choice) -> float:
    return sum(SAVING[int(mode)] for bucket in choice.schedule for mode in choice.modes[bucket])


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 7), heads=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    ages=st.integers(0, 4), buckets=st.integers(1, 4), delta=st.floats(0, 1),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_bounds_hold_and_the_saving_is_what_it_says(
    steps: int, heads: list[int], ages: int, buckets: int, delta: float, seed: int
) -> None:
    tables = _tables(steps, heads, ages, seed)
    choice = choose_buckets(tables, delta, 1.5, buckets)
    assert len(choice.modes) <= buckets and len(choice.schedule) == steps
    assert sorted(set(choice.schedule)) == list(range(len(choice.modes)))
    assert (choice.modes[choice.schedule[0]] == FULL).all()
    assert _legal(tables, _errors(tables, choice.modes, choice.schedule), delta, 1.5)
    assert _saved(choice) == pytest.approx(choice.saving)
    again = choose_buckets(tables, delta, 1.5, buckets)
    assert again.schedule == choice.schedule and (again.modes == choice.modes).all()


@pytest.mark.parametrize("seed", range(8))
def test_nothing_better_where_all_can_be_tried(seed: int) -> None:
    tables = _tables(steps=4, heads=[1, 1], ages=3, seed=seed)
    found = choose_buckets(tables, 0.3, 1.5, 2)
    best = 0.0
    for tail in itertools.product((0, 1), repeat=3):
        for second in itertools.product(SAVING, repeat=2):
            modes = np.array([[FULL, FULL], second])
            schedule = (0, *tail)
            if _legal(tables, _errors(tables, modes, schedule), 0.3, 1.5):
                best = max(best, _saved(Choice(modes, schedule, 0.0)))
    assert found.saving == pytest.approx(best)


def test_sums_bind_and_the_room_is_used() -> None:
    tables = _tables(steps=5, heads=[6], ages=2, seed=3)
    errors = [
        _errors(tables, choice.modes, choice.schedule).sum(axis=1).max()
        for choice in (choose_buckets(tables, 0.4, cap, 3) for cap in (1.0, 100.0))
    ]
    assert errors[0] <= 0.4 and 0.3 < errors[1] <= 0.4


def test_heads_are_refreshed_before_they_are_too_old() -> None:
    steps, ages = 9, 6
    cached = np.broadcast_to(0.04 * np.arange(1, ages + 1) ** 2, (steps, 1, ages)).copy()
    for step in range(steps):
        cached[step, :, step:] = np.inf
    tables = HeadTables(
        (1,), (), np.zeros((steps, 1, 0)), cached, np.zeros((1, 0)), np.ones(1)
    )  # fmt: skip
    choice = choose_buckets(tables, 0.2, 1.5, 2)  # ages 1 and 2 err 0.04 and 0.16, 3 too much
    assert choice.saving == 6
    runs = "".join(map(str, choice.schedule)).split("0")
    assert max(len(run) for run in runs) == 2


def test_a_measurement_corrects_what_caches_err() -> None:
    tables = _tables(steps=6, heads=[2], ages=3, seed=1)
    choice = choose_buckets(tables, 0.5, 1.5, 2)
    predicted = _errors(tables, choice.modes, choice.schedule)
    cached = choice.modes[list(choice.schedule)] == CACHED
    assert cached.any()
    measured = np.where(cached, 1.7 * predicted, predicted)
    corrected = tables.corrected(choice, measured)
    np.testing.assert_allclose(_errors(corrected, choice.modes, choice.schedule), measured)


def test_large_models_are_judged_on_some_modules() -> None:
    tables = _tables(steps=6, heads=[24] * 20, ages=3, seed=2)
    some = tables.some(100)
    assert some.heads == (24,) * 4 and some.arrow.shape == (6, 96, 2)
    np.testing.assert_array_equal(some.cached[:, :24], tables.cached[:, :24])
    np.testing.assert_array_equal(some.cached[:, -24:], tables.cached[:, -24:])
    choice = choose_buckets(tables, 0.4, 1.5, 3)
    assert _legal(tables, _errors(tables, choice.modes, choice.schedule), 0.4, 1.5)


def test_no_buckets_are_refused() -> None:
    with pytest.raises(ArrowheadError, match="number of buckets .* got 0"):
        choose_buckets(_tables(3, [1], 1, 0), 0.1, 1.5, 0)
