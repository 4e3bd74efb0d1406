from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.errors import ArrowheadError
from plans.solver import choose_modes, merge_steps
from plans.tiles import CACHED, FULL

ERRORS = st.one_of(st.sampled_from([0.0, 0.05, 0.1, 0.2]), st.floats(1e-9, 0.5))
HEADS = st.lists(
    st.dictionaries(st.sampled_from([CACHED, 1, 2, 4]), ERRORS, max_size=4),
    min_size=1,
    max_size=5,
)
SAVINGS = {CACHED: 1.0, 1: 0.875, 2: 0.75, 4: 0.5}


def _total(errors: list[dict[int, float]], modes: tuple[int, ...] | list[int]) -> float:
    total = 0.0
    for head, mode in zip(errors, modes, strict=True):
        total += 0.0 if mode == FULL else head[mode]
    return total


def _saved(modes: tuple[int, ...] | list[int]) -> float:
    return sum(SAVINGS.get(mode, 0.0) for mode in modes)


def _brute_force(errors: list[dict[int, float]], delta: float, cap: float) -> tuple[float, float]:
    """Best saving, and the least total error that reaches it."""
    choices = [[FULL, *(m for m, e in head.items() if e < cap)] for head in errors]
    legal = (modes for modes in itertools.product(*choices) if _total(errors, modes) <= delta)
    return max((_saved(modes), -_total(errors, modes)) for modes in legal)


@settings(max_examples=300, deadline=None)
@given(errors=HEADS, delta=st.floats(0, 1), cap=st.floats(0, 0.6))
def test_choice_equals_brute_force(
    errors: list[dict[int, float]], delta: float, cap: float
) -> None:
    modes = choose_modes(errors, [SAVINGS] * len(errors), delta, cap)
    saved, least = _brute_force(errors, delta, cap)
    assert all(m == FULL or head[m] < cap for head, m in zip(errors, modes, strict=True))
    assert _total(errors, modes) <= delta
    assert _saved(modes) == saved
    assert _total(errors, modes) == -least


def test_choice_of_24_heads_takes_milliseconds() -> None:
    rng = random.Random(0)
    spent = []
    for _ in range(40):
        errors = [{mode: 10 ** rng.uniform(-4, -0.5) for mode in SAVINGS} for _ in range(24)]
        begin = time.perf_counter()
        choose_modes(errors, [SAVINGS] * 24, 0.4, 0.4)
        spent.append(time.perf_counter() - begin)
    assert sorted(spent)[20] < 0.02


def test_missing_and_unusable_candidates_stay_full() -> None:
    errors = [{}, {CACHED: float("nan"), 1: float("inf")}, {FULL: 0.0, 2: 0.3}]
    assert choose_modes(errors, [SAVINGS] * 3, 1.0, 0.5) == [FULL, FULL, 2]
    assert choose_modes(errors, [{}] * 3, 1.0, 0.5) == [FULL] * 3
    assert choose_modes([{CACHED: 0.0}], [SAVINGS], 0.0, 0.0) == [FULL]


def test_errors_of_any_size_are_weighed() -> None:
    assert choose_modes([{}, {CACHED: 3e-304}], [SAVINGS] * 2, 0.0, 0.5) == [FULL, FULL]
    assert choose_modes([{CACHED: 1e-300}, {CACHED: 0.4}], [SAVINGS] * 2, 0.1, 0.5) == [
        CACHED,
        FULL,
    ]


def test_cap_is_strict() -> None:
    assert choose_modes([{CACHED: 0.1}], [SAVINGS], 1.0, 0.1) == [FULL]


STEPS = st.lists(
    st.lists(st.fixed_dictionaries({CACHED: ERRORS, 1: ERRORS, 4: ERRORS}), min_size=3, max_size=3),
    min_size=2,
    max_size=7,
)


@settings(max_examples=120, deadline=None)
@given(steps=STEPS, max_buckets=st.integers(1, 4), delta=st.floats(0, 0.6))
def test_merged_buckets_keep_every_bound(
    steps: list[list[dict[int, float]]], max_buckets: int, delta: float
) -> None:
    cap = 1.5 * delta / 3
    errors = [{"a": step} for step in steps]
    savings = {"a": [SAVINGS] * 3}
    merged = merge_steps(errors, savings, delta, cap, max_buckets)
    assert len(merged.buckets) <= max_buckets
    assert len(merged.schedule) == len(steps)
    assert set(merged.schedule) == set(range(len(merged.buckets)))
    assert merged.buckets[merged.schedule[0]] == {"a": (FULL,) * 3}
    for step, bucket in zip(steps, merged.schedule, strict=True):
        modes = merged.buckets[bucket]["a"]
        assert _total(step, modes) <= delta + 1e-12
        assert all(m == FULL or head[m] < cap for head, m in zip(step, modes, strict=True))
    assert merge_steps(errors, savings, delta, cap, max_buckets) == merged


def test_enough_buckets_lose_nothing() -> None:
    rng = random.Random(1)
    errors = [{"a": [{m: rng.random() * 0.2 for m in SAVINGS} for _ in range(4)]} for _ in range(6)]
    savings = {"a": [SAVINGS] * 4}
    merged = merge_steps(errors, savings, 0.3, 0.15, 6)
    for step in range(1, 6):
        best = choose_modes(errors[step]["a"], savings["a"], 0.3, 0.15)
        assert _saved(merged.buckets[merged.schedule[step]]["a"]) == _saved(best)
    saved = [
        sum(_saved(m.buckets[b]["a"]) for b in m.schedule)
        for m in (merge_steps(errors, savings, 0.3, 0.15, k) for k in (1, 2, 6))
    ]
    assert saved[0] == 0 < saved[1] <= saved[2]


def test_alternating_steps_share_buckets_that_are_not_contiguous() -> None:
    cheap = [{CACHED: 0.01}, {CACHED: 0.9}]
    other = [{CACHED: 0.9}, {CACHED: 0.01}]
    errors = [{"a": step} for step in ([{}, {}], cheap, other, cheap, other)]
    merged = merge_steps(errors, {"a": [SAVINGS] * 2}, 0.2, 0.2, 3)
    assert merged.schedule == [0, 1, 2, 1, 2]
    assert merged.buckets == [{"a": (FULL, FULL)}, {"a": (CACHED, FULL)}, {"a": (FULL, CACHED)}]


def test_sum_bound_is_kept_per_step_not_over_the_worst_of_all() -> None:
    # Each head errs at another step: worst errors sum to 0.4, every single step's to 0.22.
    errors = [{"a": [{}, {}]}, {"a": [{CACHED: 0.2}, {CACHED: 0.02}]},
              {"a": [{CACHED: 0.02}, {CACHED: 0.2}]}]  # fmt: skip
    merged = merge_steps(errors, {"a": [SAVINGS] * 2}, 0.25, 0.3, 2)
    assert merged.buckets[1] == {"a": (CACHED, CACHED)}


def test_no_buckets_are_refused() -> None:
    with pytest.raises(ArrowheadError, match="number of buckets .* got 0"):
        merge_steps([{}], {}, 0.1, 0.1, 0)
