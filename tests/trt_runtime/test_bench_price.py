"""Prices as far as a machine without a GPU can tell: what is timed, what is fitted, who refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plans.prices import Prices, load_prices, save_prices
from plans.tiles import CACHED, FULL
from trt_runtime import bench_price
from trt_runtime.attention_cases import CASES
from trt_runtime.bench_price import (
    _counts,
    _projection,
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
