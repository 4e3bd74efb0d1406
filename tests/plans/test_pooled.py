"""One bound for a whole run."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from plans.bounds import Bounds, raise_offenders
from plans.buckets import Choice, choose_buckets, predicted_errors
from plans.pooled import _each_step, _scheduled, choose_pooled, most_saved, reach
from plans.tables import HeadTables
from plans.tiles import CACHED, FULL
from tests import tiny


def tables_of(steps: int = 4, heads: tuple[int, ...] = (2, 2), seed: int = 0) -> HeadTables:
    """Errors that grow as windows narrow and caches age, of heads that differ tenfold."""
    rng = np.random.default_rng(seed)
    rows = sum(heads)
    level = 10 ** rng.uniform(-1.5, 0, (steps, rows, 1))
    arrow = level * np.array([1.0, 0.4]) * rng.uniform(0.5, 1, (steps, rows, 1))
    cached = level * np.arange(1, steps)
    for step in range(steps):
        cached[step, :, step:] = np.inf
    return HeadTables(
        heads=heads, windows=(1, 2), arrow=arrow, cached=cached,
        arrow_saving=np.tile([0.7, 0.5], (rows, 1)), cached_saving=np.ones(rows),
        weights=rng.uniform(0.5, 2, (steps, rows)),
    ).under("full")  # fmt: skip


def every_run(tables: HeadTables, head: int) -> list[tuple[float, float]]:
    """Saving and error of all runs of a head."""
    codes = (FULL, 1, 2, CACHED)
    saving = dict(zip(codes, (0.0, 0.7, 0.5, 1.0), strict=True))
    weights = np.broadcast_to(tables.weights, tables.arrow.shape[:2])
    found = []
    for run in product(codes, repeat=tables.steps):
        if run[0] != FULL:
            continue
        errors, at = 0.0, 0
        for step, mode in enumerate(run):
            at = at if mode == CACHED else step
            own = 0.0 if run[at] == FULL else tables.arrow[at, head, run[at] - 1]
            aged = tables.cached[step, head, step - at - 1] if step > at else 0.0
            errors += weights[step, head] * (own + aged)
        found.append((sum(saving[mode] for mode in run), errors))
    return found


@pytest.mark.parametrize("delta", [0.05, 0.2, 0.8])
def test_with_a_bucket_a_step_the_choice_is_on_the_convex_hull(delta: float) -> None:
    """No mix of runs of the same error saves more: the linear relaxation is a step of one head off.

    Its optimum is found here by enumeration, head by head, over a fine grid of prices.
    """
    tables = tables_of()
    budget = delta * tables.steps * len(tables.heads)
    choice = _each_step(tables, budget)
    errors = predicted_errors(tables, choice)
    assert errors.sum() <= budget * (1 + 1e-9)
    runs = [every_run(tables, head) for head in range(4)]
    dual = min(
        price * budget + sum(max(s - price * e for s, e in own) for own in runs)
        for price in np.geomspace(0.01, 1000, 4000)
    )
    step = max(s for own in runs for s, _ in own)
    assert dual - step <= choice.saving <= dual + 1e-9
    assert choice.saving > 0
    most = most_saved(tables, delta)
    assert most == pytest.approx(dual, rel=1e-4)
    for buckets in (2, 3, tables.steps):
        assert choose_pooled(tables, delta, 1.5, buckets).saving <= most + 1e-9


@pytest.mark.parametrize("buckets", [2, 3])
def test_few_graphs_save_more_than_with_a_bound_for_each_step_and_module(buckets: int) -> None:
    tables = tables_of(steps=6, heads=(6, 6), seed=1)
    bounded = choose_buckets(tables, 0.4, 1.5, buckets)
    pooled = choose_pooled(tables, 0.4, 1.5, buckets)
    assert len(pooled.modes) <= buckets and set(pooled.modes[0]) == {FULL}
    assert predicted_errors(tables, pooled).sum() <= 0.4 * tables.steps * 2 * (1 + 1e-9)
    assert pooled.saving > bounded.saving


def test_a_graph_a_step_saves_more_at_the_error_of_bounded_modules() -> None:
    tables = tables_of(steps=6, heads=(6, 6), seed=1)
    bounded = choose_buckets(tables, 0.4, 1.5, 6)
    mean = predicted_errors(tables, bounded).sum() / (tables.steps * len(tables.heads))
    assert choose_pooled(tables, mean, 1.5, 6).saving > bounded.saving


def test_an_error_reaches_as_far_as_outputs_computed_behind_it_are_read() -> None:
    tables = tables_of(steps=3, heads=(1, 2))
    modes = np.array([[FULL, FULL, FULL], [1, 1, CACHED], [2, CACHED, CACHED]])
    found = reach(tables, Choice(modes, (0, 1, 2), 0.0))
    # Behind the first module: at step 0 outputs read for 1 and 3 steps, at step 1 one for 2.
    np.testing.assert_allclose(found[:, 0], [(1 + 1 + 3) / 3, (1 + 2) / 3, 1 / 3])
    np.testing.assert_array_equal(found[:, 1:], 1)


@pytest.mark.parametrize(("buckets", "less"), [(3, 1.0), (6, 0.97)])
def test_less_error_is_made_where_it_reaches_far(buckets: int, less: float) -> None:
    tables = tables_of(steps=6, heads=(4, 4, 4), seed=3)
    budget = 0.4 * tables.steps * len(tables.heads)
    choice = choose_pooled(tables, 0.4, 1.5, buckets)
    errors = predicted_errors(tables, choice)
    assert 0.8 * budget < errors.sum() <= budget * (1 + 1e-9)
    if buckets == tables.steps:
        plain = _each_step(tables, budget)
    else:
        plain = _scheduled(tables, 0.4, buckets, None, None)
    spent = predicted_errors(tables, plain)
    far = (errors * reach(tables, choice)).sum() / errors.sum()
    assert far < less * (spent * reach(tables, plain)).sum() / spent.sum()


def test_pooled_bounds_hold_the_mean_alone_and_raise_the_largest_errors() -> None:
    plan = tiny.random_plan(tiny.tiny_flux())
    rng = np.random.default_rng(0)
    errors = [
        {
            m.name: [0.0 if mode == FULL else float(rng.uniform(0, 2)) for mode in row[m.name]]
            for m in plan.modules
        }
        for row in (plan.modes_at(step) for step in range(plan.steps))
    ]
    mean = np.mean([sum(heads) for row in errors for heads in row.values()])
    wide, narrow = Bounds(float(mean) * 1.01, 1.5, True), Bounds(float(mean) / 2, 1.5, True)
    assert not wide.broken(plan.modules, errors) and narrow.broken(plan.modules, errors)
    assert Bounds(float(mean) * 1.01, 1.5).broken(plan.modules, errors)
    raised = raise_offenders(plan, errors, narrow, None)
    left = sum(
        e for step, row in enumerate(errors) for name, heads in row.items()
        for e, mode in zip(heads, raised.modes_at(step)[name], strict=True) if mode != FULL
    )  # fmt: skip
    assert 0 < left <= narrow.delta * plan.steps * len(plan.modules) * (1 + 1e-9)
