"""How a search runs: prompts one by one, without a final check, resumed, with prices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from plans.accounting import account
from plans.bounds import Bounds
from plans.effort import Wanted
from plans.plan import check_plan
from plans.prices import Price, Prices, shape_of
from plans.search import measure
from plans.tiles import CACHED, FULL
from tests.tiny_pipelines import STEPS, flux_pipeline, sd3_pipeline, search


def test_prompts_one_by_one_run_with_the_plan_so_far() -> None:
    """Each run is of one prompt, with its own noise; all prompts are seen before the end."""
    pipe, prompts = sd3_pipeline()
    reports: list = []
    wanted = Wanted(rounds=4, pictures_per_run=1, final_check=True)
    plan = search(pipe, prompts, wanted=wanted, progress=lambda *report: reports.append(report))
    record = plan.search
    assert record is not None and record["basis"] == "measured"
    assert record["measurements"] >= 1 and len(record["measured_prompts"]) >= 1
    stages = list(dict.fromkeys(report[0] for report in reports))
    assert stages[:3] == ["record", "choose", "measure 1"]
    check_plan(plan)
    for prompt in record["measured_prompts"]:
        part = {name: value[prompt : prompt + 1] for name, value in prompts.items()}
        errors = measure(pipe, plan, part, seed=prompt)
        assert not Bounds(0.3, 1.5, pooled=True).broken(plan.modules, errors)


def test_without_a_final_check_predicted_errors_are_called_so() -> None:
    pipe, prompts = flux_pipeline()
    wanted = Wanted(rounds=1, final_check=False)
    for delta in (0.01, 0.05, 0.3):
        plan = search(pipe, prompts, wanted=wanted, delta=delta)
        record = plan.search
        assert record is not None and record["measurements"] == 1
        assert np.mean(list(record["errors"].values())) <= delta
        errors = measure(pipe, plan, prompts)
        told = record["errors"][plan.modules[0].name]
        if record["basis"] == "measured":
            own = [sum(row[plan.modules[0].name]) for row in errors]
            assert own == pytest.approx(told, rel=1e-3, abs=1e-9)
        else:
            assert record["basis"] == "predicted"


def test_a_search_that_was_cut_off_goes_on(tmp_path: Any) -> None:
    pipe, prompts = flux_pipeline()
    whole = search(pipe, prompts)
    runs: list[str] = []

    def cut(stage: str, done: int, total: int, saved: float) -> None:
        runs.append(stage)
        if stage == "measure 1" and done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(pipe, prompts, scratch=tmp_path, progress=cut)
    assert len(list(tmp_path.glob("*/*.npz"))) == 1
    other = search(pipe, prompts, scratch=tmp_path, resume=True, seed=1)
    assert other.search is not None and other.search["resumed_runs"] == 0
    runs.clear()
    plan = search(
        pipe, prompts, scratch=tmp_path, resume=True, progress=lambda stage, *_: runs.append(stage)
    )
    assert "record" not in runs and "measure 1" in runs
    assert plan.sha256 == whole.sha256
    assert plan.search is not None and plan.search["resumed_runs"] == 1
    assert not list(tmp_path.glob("*/*.npz"))


def test_prices_decide_what_is_tried_and_what_is_saved() -> None:
    pipe, prompts = flux_pipeline()
    modules = search(pipe, prompts, delta=0.0).modules
    shapes = {shape_of(module, 1) for module in modules}
    attention = {FULL: 1.0, 1: 1.5, 0: 0.5, CACHED: 0.1}  # the wider arrow is slower than full
    prices = Prices("a GPU", "0123", tuple(Price(s, attention, 0.2) for s in shapes))
    plan = search(pipe, prompts, delta=3.0, cap_factor=8.0, prices=prices)
    modes = [mode for b in plan.buckets for row in b.modes.values() for mode in row]
    assert 1 not in modes and set(modes) & {0, CACHED}
    told = plan.search["prices"]
    heads = sum(module.heads for module in modules)
    assert told["dense_ms"] == pytest.approx(STEPS * heads * 1.2)
    saved = sum(
        {FULL: 0.0, 0: 0.5, CACHED: 1.1}[mode]
        for step in range(STEPS)
        for row in plan.modes_at(step).values()
        for mode in row
    )
    assert told["saved_ms"] == pytest.approx(saved, abs=1e-3)
    assert plan.accounting == account(plan, 1)
