from __future__ import annotations

import itertools
import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from plans.solver import choose_modes
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
