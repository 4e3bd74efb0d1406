"""Prices as far as a machine without a GPU can tell: what is timed, what is fitted, who refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plans.errors import ArrowheadError
from plans.plan import save_plan
from plans.prices import Price, Prices, Shape, load_prices, save_prices
from plans.tiles import CACHED, FULL
from tests import tiny
from trt_runtime import bench_price
from trt_runtime.attention_cases import CASES
from trt_runtime.bench_price import (
    _counts,
    _projection,
    complete,
    head_counts,
    price,
    price_mixes,
    shape_of_case,
    table,
)
from trt_runtime.cli import main

COST = {FULL: 0.24, 8: 0.05, 4: 0.03, 2: 0.02, CACHED: 0.004}


@pytest.mark.parametrize("name", CASES)
def test_the_mixes_tell_every_mode_from_the_others(name: str) -> None:
    shape = shape_of_case(CASES[name])
    mixes = price_mixes(shape, (8, 16, 32))
    cost = {mode: 0.01 * (i + 1) for i, mode in enumerate({m for x in mixes for m in _counts(x)})}
    assert all(len(mix.modes()) == shape.heads for mix in mixes)
    times = {mix: sum(cost[m] * n for m, n in _counts(mix).items()) for mix in mixes}
    found = price(shape, times, {n: 0.3 + 0.02 * n for n in head_counts(shape)})
    assert found.attention == pytest.approx(cost) and {FULL, CACHED} < set(found.attention)
    assert found.projection == pytest.approx(0.02)


def test_projections_are_of_the_heads_that_are_computed() -> None:
    shape = shape_of_case(CASES["sd3-1k"])
    assert head_counts(shape) == [6, 12, 18, 24]
    seen: list[tuple[int, ...]] = []
    linear = torch.nn.functional.linear

    class Spy:
        @staticmethod
        def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            seen.append((*x.shape, *weight.shape))
            return linear(x[:1], weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_price, "F", Spy)
        _projection(shape, 6, device="cpu")()
    assert seen == [(2 * (4096 + 333), 24 * 64, 6 * 64, 24 * 64)] * 3


def test_measured_prices_join_the_file_and_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(shapes: list, **_: object) -> Prices:
        times = {mix: sum(COST[m] * n for m, n in _counts(mix).items()) for mix in
                 price_mixes(shapes[0], (8, 16, 32))}  # fmt: skip
        return Prices("a GPU", "0123", tuple(price(s, times, {6: 0.1, 24: 0.4}) for s in shapes))

    monkeypatch.setattr(bench_price, "measure_prices", measured)
    path = tmp_path / "prices.json"
    save_prices(measured([shape_of_case(CASES["sd3-2k"])]), path)
    assert main(["bench", "attention", "--case", "flux-2k", "--price", str(path)]) == 0
    prices = load_prices(path)
    assert len(prices.prices) == 2
    out = capsys.readouterr().out
    assert "a GPU" in out and "hw4" in out and str(path) in out
    assert len(table(prices)) == 10


def test_a_plans_shapes_are_priced_at_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Shape] = []

    def measured(shapes: list[Shape], **_: object) -> Prices:
        seen.extend(shapes)
        return Prices("a GPU", "0123", tuple(Price(s, {FULL: 1.0}, 0.1) for s in shapes))

    monkeypatch.setattr(bench_price, "measure_prices", measured)
    plan = tiny.random_plan(tiny.tiny_sd3())
    save_plan(plan, tmp_path / "plan.json")
    file = tmp_path / "prices.json"
    command = ["bench", "attention", "--price", str(file), "--plan", str(tmp_path / "plan.json")]
    assert main([*command, "--batch", "5"]) == 0
    assert {shape.rows for shape in seen} == {10}
    prices = replace(load_prices(file), batch=5)
    assert prices.find(plan.modules[0], 2).shape in seen
    with pytest.raises(ArrowheadError, match="--plan PLAN --batch 4"):
        replace(prices, batch=4).find(plan.modules[0], 2)


def test_shapes_that_a_file_lacks_are_measured_and_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    cases = {name: shape_of_case(CASES[name]) for name in ("flux-2k", "sd3-2k", "sd3-1k")}

    def measured(shapes: list[Shape], **_: object) -> Prices:
        asked.append([name for name, shape in cases.items() if shape in shapes])
        return Prices("a GPU", "0123", tuple(Price(s, {FULL: 1.0}, 0.1) for s in shapes))

    monkeypatch.setattr(bench_price, "measure_prices", measured)
    file = tmp_path / "new" / "prices.json"
    complete(file, [cases["flux-2k"]])
    complete(file, [cases["flux-2k"], cases["sd3-1k"]])
    found = complete(file, list(cases.values())[::2])
    assert asked == [["flux-2k"], ["sd3-1k"]]
    assert {price.shape for price in found.prices} == {cases["flux-2k"], cases["sd3-1k"]}
    assert load_prices(file) == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ["bench", "attention", "--price", "prices.json", "--case", "flux-2k"],
        ["bench", "attention", "--price", "--case", "flux-2k"],
        ["plan", "search", "--model", "any", "--output", "plan.json", "--prices"],
    ],
)
def test_without_a_gpu_prices_are_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert "no GPU that this PyTorch can use" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
