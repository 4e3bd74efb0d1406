"""Buckets and schedules: within every bound, best for their schedule, caches refreshed in time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.buckets import Choice, Judge, choose_buckets, corrected
from plans.errors import ArrowheadError
from plans.estimate import Estimate
from plans.optimum import per_step
from plans.refine import all_options, exchange_pairs
from plans.tables import FIRST_STEPS, HeadTables, load_tables, save_tables
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
    seed=st.integers(0, 999), rule=st.sampled_from(FIRST_STEPS),
)  # fmt: skip
def test_bounds_hold_and_the_saving_is_what_it_says(
    steps: int, heads: list[int], ages: int, buckets: int, delta: float, seed: int, rule: str
) -> None:
    tables = _tables(steps, heads, ages, seed).under(rule)
    choice = choose_buckets(tables, delta, 1.5, buckets)
    assert len(choice.modes) <= buckets and len(choice.schedule) == steps
    assert sorted(set(choice.schedule)) == list(range(len(choice.modes)))
    first = choice.modes[choice.schedule[0]]
    assert (first != CACHED).all() and (rule == "arrow" or (first == FULL).all())
    assert _legal(tables, _errors(tables, choice.modes, choice.schedule), delta, 1.5)
    assert _saved(choice) == pytest.approx(choice.saving)
    again = choose_buckets(tables, delta, 1.5, buckets)
    assert again.schedule == choice.schedule and (again.modes == choice.modes).all()


@pytest.mark.parametrize("rule", FIRST_STEPS)
@pytest.mark.parametrize("seed", range(8))
def test_nothing_better_where_all_can_be_tried(seed: int, rule: str) -> None:
    tables = _tables(steps=4, heads=[1, 1], ages=3, seed=seed).under(rule)
    found = choose_buckets(tables, 0.3, 1.5, 2)
    best = 0.0
    for tail in itertools.product((0, 1), repeat=3):
        for both in itertools.product(itertools.product(SAVING, repeat=2), repeat=2):
            modes = np.array(both)
            schedule = (0, *tail)
            if (modes[0] == CACHED).any():
                continue
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
    tables = HeadTables(  # no arrows: the first step is full under either rule
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
    learnt = corrected(tables, choice, measured)
    np.testing.assert_allclose(_errors(learnt, choice.modes, choice.schedule), measured)


def test_large_models_are_chosen_for_by_the_estimate() -> None:
    tables = _tables(steps=6, heads=[24] * 9, ages=3, seed=2)
    choice = choose_buckets(tables, 0.4, 1.5, 3)
    assert _legal(tables, _errors(tables, choice.modes, choice.schedule), 0.4, 1.5)
    assert _saved(choice) == pytest.approx(choice.saving)
    again = choose_buckets(tables, 0.3, 1.5, 3, start=choice.schedule)
    assert _legal(tables, _errors(tables, again.modes, again.schedule), 0.3, 1.5)
    assert 0 < again.saving <= choice.saving


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 7), heads=st.lists(st.integers(1, 3), min_size=1, max_size=30),
    ages=st.integers(0, 4), schedule=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    seed=st.integers(0, 999), rule=st.sampled_from(FIRST_STEPS),
)  # fmt: skip
def test_the_estimate_is_exact_where_no_sum_binds(
    steps: int, heads: list[int], ages: int, schedule: list[int], seed: int, rule: str
) -> None:
    tables = _tables(steps, heads, ages, seed).under(rule)
    rows = sum(heads)
    plan = (0, *schedule)[:steps]
    cap = 0.2
    estimate = Estimate(tables, np.full(rows, cap)).saving(plan)
    # One head a module, so that the bound on sums is no tighter than the cap.
    alone = replace(tables, heads=(1,) * rows)
    assert estimate == pytest.approx(Judge(alone, cap, 1.0).saving(plan), rel=1e-5)


@pytest.mark.parametrize("rule", FIRST_STEPS)
@pytest.mark.parametrize("seed", range(4))
def test_nothing_saves_more_than_the_bound(seed: int, rule: str) -> None:
    tables = _tables(steps=5, heads=[2, 1], ages=3, seed=seed).under(rule)
    bound = per_step(tables, 0.3, 1.5).bound
    for buckets in (1, 2, 5):
        assert choose_buckets(tables, 0.3, 1.5, buckets).saving <= bound * (1 + 1e-9)
    best = 0.0  # of one head alone, all sequences tried
    one = replace(
        tables, heads=(1,), arrow=tables.arrow[:, :1], cached=tables.cached[:, :1],
        arrow_saving=tables.arrow_saving[:1], cached_saving=tables.cached_saving[:1],
    )  # fmt: skip
    for modes in itertools.product(SAVING, repeat=5):
        choice = Choice(np.array([[mode] for mode in modes]), tuple(range(5)), 0.0)
        if modes[0] != CACHED and _legal(
            one, _errors(one, choice.modes, choice.schedule), 0.3, 1.0
        ):
            best = max(best, _saved(choice))
    found = per_step(one, 0.3, 1.0)
    assert found.bound == pytest.approx(best, rel=0.02)
    assert found.bound >= best * (1 - 1e-9)
    assert found.reached == pytest.approx(best)


@pytest.mark.parametrize("rule", FIRST_STEPS)
@pytest.mark.parametrize("seed", range(4))
def test_what_a_graph_a_step_reaches_is_within_the_sums(seed: int, rule: str) -> None:
    """Two heads of one module, all sequences tried: near the best, and none better."""
    tables = _tables(steps=4, heads=[2], ages=3, seed=seed).under(rule)
    best = 0.0
    for modes in itertools.product(itertools.product(SAVING, repeat=2), repeat=4):
        choice = Choice(np.array(modes), tuple(range(4)), 0.0)
        if CACHED not in modes[0] and _legal(
            tables, _errors(tables, choice.modes, choice.schedule), 0.3, 1.5
        ):
            best = max(best, _saved(choice))
    reached, bound = per_step(tables, 0.3, 1.5)
    assert 0.9 * best <= reached <= best * (1 + 1e-9) <= bound * (1 + 1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_pairs_of_heads_are_exchanged_until_none_saves_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    savings, errors = rng.uniform(0, 1, (12, 2)), rng.uniform(0, 0.3, (12, 5, 2))
    savings[0], errors[0] = 0, 0
    savings[rng.integers(1, 12, 2)] = -np.inf
    picked = exchange_pairs(savings, errors, np.zeros(2, dtype=int), 0.4)
    best = max(
        savings[i, 0] + savings[j, 1]
        for i, j in itertools.product(range(12), repeat=2)
        if ((errors[i, :, 0] + errors[j, :, 1]) <= 0.4).all()
    )
    assert savings[picked, [0, 1]].sum() == pytest.approx(best)
    assert (errors[picked, :, [0, 1]].sum(axis=0) <= 0.4).all()


def test_all_options_are_tried_only_where_they_are_few() -> None:
    options = all_options(3, (0, 1, 2, 1), heads=2)
    assert options is not None and options.shape == (9, 3) and not options[:, 0].any()
    assert len(set(map(tuple, options))) == 9
    options = all_options(3, (0, 1, 0, 1), heads=2, first=(0, 2))
    assert options is not None and options.shape == (6, 2)
    assert set(options[:, 0]) == {0, 2} and set(options[:, 1]) == {0, 1, 2}
    assert all_options(5, (0, 1, 2, 3, 4, 5), heads=24) is None


def test_an_arrow_in_the_first_step_saves_a_bucket() -> None:
    """A head that errs nothing as an arrow needs no full graph where the first step may have it."""
    steps = 6
    tables = HeadTables(
        (1,), (1,), np.full((steps, 1, 1), 0.01), np.full((steps, 1, 1), np.inf),
        np.ones((1, 1)), np.ones(1),
    )  # fmt: skip
    saved = [choose_buckets(tables.under(rule), 0.2, 1.5, 1).saving for rule in FIRST_STEPS]
    assert saved == [0, steps]
    assert [per_step(tables.under(rule), 0.2, 1.5).reached for rule in FIRST_STEPS] == [
        pytest.approx(steps - 1), pytest.approx(steps)
    ]  # fmt: skip
    with pytest.raises(ArrowheadError, match="first step .* got cached; expected one of full, arr"):
        tables.under("cached")


def test_tables_come_back_from_their_file(tmp_path: Path) -> None:
    tables = _tables(steps=4, heads=[2, 3], ages=2, seed=0)
    save_tables(tables, tmp_path / "tables.npz")
    back = load_tables(tmp_path / "tables.npz")
    assert back.heads == tables.heads and back.windows == tables.windows
    for name in ("arrow", "cached", "arrow_saving", "cached_saving", "drift", "weights"):
        np.testing.assert_array_equal(getattr(back, name), getattr(tables, name))
    (tmp_path / "other.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ArrowheadError, match="tables .*other.npz"):
        load_tables(tmp_path / "other.npz")


def test_tables_of_older_files_weigh_all_errors_alike(tmp_path: Path) -> None:
    tables = _tables(steps=3, heads=[2], ages=1, seed=0)
    save_tables(tables, tmp_path / "tables.npz")
    with np.load(tmp_path / "tables.npz") as arrays:
        kept = {name: arrays[name] for name in arrays.files if name != "weights"}
    np.savez(tmp_path / "older.npz", **kept)
    np.testing.assert_array_equal(load_tables(tmp_path / "older.npz").weights, 1)


@pytest.mark.parametrize("seed", range(6))
def test_weights_multiply_all_errors_of_their_step(seed: int) -> None:
    """That a cache errs by the arrow it was written with counts at the step that reads it."""
    tables = _tables(steps=6, heads=[3, 2], ages=3, seed=seed)
    weights = 10 ** np.random.default_rng(seed).uniform(-1, 1, (6, 5))
    weighted = replace(tables, weights=weights)
    for buckets in (2, 3, 6):
        choice = choose_buckets(weighted, 0.3, 1.5, buckets)
        errors = weights * _errors(tables, choice.modes, choice.schedule)
        np.testing.assert_allclose(Judge(weighted, 0.3, 1.5).errors_of(choice), errors)
        assert _legal(tables, errors, 0.3, 1.5)
        cap = np.repeat(1.5 * 0.3 / np.array([3, 2]), [3, 2])
        alone = replace(weighted, heads=(1,) * 5)
        judged = Judge(alone, 1e9, 1e9)
        judged._cap = cap
        assert Estimate(weighted, cap).saving(choice.schedule) == pytest.approx(
            judged.saving(choice.schedule), rel=1e-4
        )
        assert choice.saving <= per_step(weighted, 0.3, 1.5).bound * (1 + 1e-9)


def test_a_weight_of_all_is_a_bound_divided_by_it() -> None:
    tables = _tables(steps=6, heads=[3, 2], ages=3, seed=1)
    weighted = replace(tables, weights=np.full((6, 5), 4.0))
    ours, plain = choose_buckets(weighted, 0.8, 1.5, 3), choose_buckets(tables, 0.2, 1.5, 3)
    assert ours.schedule == plain.schedule and (ours.modes == plain.modes).all()
    bounds = per_step(weighted, 0.8, 1.5).bound, per_step(tables, 0.2, 1.5).bound
    assert bounds[0] == pytest.approx(bounds[1])


def test_no_buckets_are_refused() -> None:
    with pytest.raises(ArrowheadError, match="number of buckets .* got 0"):
        choose_buckets(_tables(3, [1], 1, 0), 0.1, 1.5, 0)
