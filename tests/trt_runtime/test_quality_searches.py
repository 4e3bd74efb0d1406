"""Searches of `bench quality` that weight errors or save milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plans.errors import ArrowheadError
from plans.plan import load_plan
from plans.prices import Price, Prices, save_prices, shape_of
from plans.tiles import CACHED, FULL
from tests import tiny
from tests.trt_runtime.conftest import Made
from tests.trt_runtime.test_quality import base_settings, verdicts
from trt_runtime.cli import parser
from trt_runtime.cli_quality import _prices
from trt_runtime.pipeline import load_source_pipeline
from trt_runtime.quality import measure_quality
from trt_runtime.quality_page import write_page
from trt_runtime.quality_peers import FIRST_BLOCK
from trt_runtime.quality_report import spread


@pytest.fixture
def pipe(torch_bundle: Callable[[str], Made], prompts_without_encoders: None) -> Any:
    folder, _, _ = torch_bundle("sd3")
    return load_source_pipeline(str(folder.parent / "model"), dtype=torch.float32)


def test_searches_with_other_weights_and_with_prices(pipe: Any, tmp_path: Path) -> None:
    variants = ("both", "output", "stream", "stream-dt", "gradient", "paper")
    settings = base_settings(deltas=(0.8,), variants=variants, fewer_steps=())
    report = measure_quality(pipe, settings, tmp_path / "plain", verdicts=verdicts)
    records = [load_plan(tmp_path / "plain" / row["plan"]).search for row in report["rows"]]
    weights = [record["error_weights"] for record in records if record is not None]
    assert weights == ["head", "output", "stream", "stream-dt", "gradient", "head"]
    assert "prices" not in report["settings"] and not any("prices" in r for r in records if r)

    modules = load_plan(tmp_path / "plain" / report["rows"][0]["plan"]).modules
    shapes = {shape_of(module, 2 * settings.batch) for module in modules}
    cost = {FULL: 1.0, CACHED: 0.1} | {window: 2.0 for window in range(5)}
    prices = Prices("a GPU", "0123", tuple(Price(s, cost, 0.2) for s in shapes), settings.batch)
    variants = ("both", "paper", "priced", "fewer")
    priced = replace(settings, variants=variants, fewer_steps=(2,), prices=prices)
    report = measure_quality(pipe, priced, tmp_path / "priced", verdicts=verdicts)
    told = report["settings"]["prices"]
    assert (told["device"], told["batch"]) == ("a GPU", settings.batch)
    assert told["ms"][0]["-2"] == pytest.approx(0.1)
    plans = {r["variant"]: load_plan(tmp_path / "priced" / r["plan"]) for r in report["rows"]}
    assert list(plans) == ["both", "paper", "priced", "fewer"]
    saving_time = [plans.pop("priced"), plans.pop("fewer")]
    for plan in plans.values():
        assert plan.search is not None and "prices" not in plan.search
    for plan in saving_time:
        modes = {mode for b in plan.buckets for row in b.modes.values() for mode in row}
        assert modes <= {FULL, CACHED} and plan.search is not None
        assert plan.search["prices"]["batch"] == settings.batch
    with pytest.raises(ArrowheadError, match="settings of .*prices"):
        measure_quality(pipe, replace(priced, prices=None), tmp_path / "priced", resume=True)


def test_without_prices_no_plan_saves_milliseconds(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings(deltas=(0.8,), variants=("priced", "steps"), fewer_steps=(2,))
    report = measure_quality(pipe, settings, tmp_path, verdicts=verdicts)
    assert [row["variant"] for row in report["rows"]] == ["steps"]
    assert report["skipped"] == {"priced": "no prices: pass --prices on a GPU"}


def test_prices_are_those_of_the_batch(pipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    arguments = parser().parse_args(
        [
            "bench", "quality", "--model", "m", "--prompts", "p", "--output", "o", "--batch", "3",
            "--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH), "--block", str(tiny.BLOCK),
            "--num-inference-steps", "3", "--prices", str(file),
        ]
    )  # fmt: skip
    modules = tiny.spec_of(pipe.transformer).modules
    shapes = {shape_of(module, 6) for module in modules}
    cost = {FULL: 1.0, CACHED: 0.1}
    save_prices(Prices("a GPU", "0123", tuple(Price(s, cost, 0.2) for s in shapes)), file)
    found = _prices(pipe, arguments)
    assert found is not None and found.batch == 3
    assert found.find(modules[0], 2).shape.rows == 6
    arguments.prices = None
    assert _prices(pipe, arguments) is None


def test_plans_of_fewer_steps_count_what_the_steps_save_too(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings(
        deltas=(), stacked_deltas=(0.8,), variants=("steps", "fewer"), fewer_steps=(2,)
    )
    plain, ours = measure_quality(pipe, settings, tmp_path, verdicts=verdicts)["rows"]
    assert (plain["name"], ours["name"]) == ("2 steps", "fewer, 2 steps, delta 0.8")
    plan = load_plan(tmp_path / ours["plan"])
    assert plan.steps == 2 and plan.accounting is not None
    share = 2 / settings.steps
    assert plain["attention_flops_saved"] == pytest.approx(1 - share)
    own = plan.accounting["attention_flops_saved"]
    assert own > 0 and ours["attention_flops_saved"] == pytest.approx(1 - share * (1 - own))


def test_plans_of_a_bound_are_searched_several_times(pipe: Any, tmp_path: Path) -> None:
    once = base_settings(deltas=(0.5,), variants=("both", "layer", "random"), fewer_steps=())
    first_rows = measure_quality(pipe, once, tmp_path, verdicts=verdicts)["rows"]
    settings = replace(once, searches=2)
    report = measure_quality(pipe, settings, tmp_path, verdicts=verdicts, resume=True)
    assert report["rows"][:3] == first_rows and spread(report | {"rows": first_rows}) == []
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows)[3:] == [f"{name}, search 2" for name in list(rows)[:3]]
    plans = {name: load_plan(tmp_path / row["plan"]) for name, row in rows.items()}
    seeds = {name: (plan.search or {})["seed"] for name, plan in plans.items()}
    step = len(settings.calibration)
    for kind in ("both", "layer"):
        first, second = f"{kind}, delta 0.5", f"{kind}, delta 0.5, search 2"
        assert seeds[second] == seeds[first] + step
    shuffled, ours = plans["random, delta 0.5, search 2"], plans["both, delta 0.5, search 2"]
    for of_random, of_ours in zip(shuffled.buckets, ours.buckets, strict=True):
        found, expected = (
            sorted(mode for row in bucket.modes.values() for mode in row)
            for bucket in (of_random, of_ours)
        )
        assert found == expected
    told = {name: cells for name, *cells in spread(report)}
    assert list(told) == ["both, delta 0.5", "layer, delta 0.5", "random, delta 0.5"]
    saved = [rows[f"both, delta 0.5{end}"]["attention_flops_saved"] for end in ("", ", search 2")]
    assert told["both, delta 0.5"][:2] == ["2", f"{50 * sum(saved):.1f} %"]
    assert told["both, delta 0.5"][2:4] == [f"{100 * f(saved):.1f} %" for f in (min, max)]
    write_page(report, tmp_path / "page.html")
    assert "Plans of the same bound" in (tmp_path / "page.html").read_text()


def test_plans_under_a_step_cache_are_searched_for_its_threshold(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings(
        deltas=(), stacked_deltas=(0.2, 0.8), thresholds=(1e-9, 1e9), variants=("stacked",)
    )
    one = replace(settings, stacked_deltas=(0.2,))
    first_rows = measure_quality(pipe, one, tmp_path, verdicts=verdicts)["rows"]
    seen: list[str] = []
    rows = measure_quality(
        pipe, settings, tmp_path, verdicts=verdicts, resume=True,
        progress=lambda what, *_: seen.append(what),
    )["rows"]  # fmt: skip
    assert rows[:2] == first_rows  # neither drawn nor searched again
    searched = {what.split(":")[0] for what in seen if "search" in what}
    assert searched == {row["name"] for row in rows[2:]}
    assert [row["name"] for row in rows] == [
        f"stacked, delta {delta:g}, threshold {threshold:g}"
        for delta in (0.2, 0.8) for threshold in (1e-9, 1e9)
    ]  # fmt: skip
    never, always = (load_plan(tmp_path / row["plan"]) for row in rows[2:])
    for plan in (never, always):
        first = [plan.modes_at(step)[m.name] for step in range(plan.steps) for m in plan.modules if
                 m.name.startswith(FIRST_BLOCK)]  # fmt: skip
        assert CACHED not in {mode for row in first for mode in row}
    assert len(never.buckets) > 1 == len(always.buckets)
    assert rows[3]["transformer_flops_saved"] == pytest.approx(rows[1]["transformer_flops_saved"])
    assert rows[2]["attention_flops_saved"] > 0
