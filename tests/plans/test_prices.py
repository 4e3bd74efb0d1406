"""Prices: fitted to mixes, kept in a file, and what the search does with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plans.errors import ArrowheadError
from plans.models import AttentionModule
from plans.prices import Price, Prices, fit, load_prices, merged, save_prices, shape_of
from plans.tiles import CACHED, FULL, TokenLayout

MODULE = AttentionModule("attn", 24, 128, TokenLayout(16384, 512, True), True)
OTHER = AttentionModule("attn2", 24, 128, TokenLayout(4096, 0, True), True)


def _prices(device: str = "a GPU", full: float = 0.24) -> Prices:
    attention = {FULL: full, 8: 0.05, 4: 0.03, 2: 0.25, CACHED: 0.004}
    return Prices(device, "0123", (Price(shape_of(MODULE, 1), attention, 0.02),))


def test_a_linear_cost_is_found_again() -> None:
    cost = {FULL: 0.24, 4: 0.03, CACHED: 0.004}
    mixes = [{FULL: 24}, {4: 24}, {CACHED: 24}, {FULL: 8, 4: 8, CACHED: 8}, {FULL: 12, CACHED: 12}]
    times = [sum(cost[mode] * n for mode, n in mix.items()) for mix in mixes]
    assert fit(mixes, times) == pytest.approx(cost)
    slope = fit([{FULL: n} for n in (6, 12, 24)], [0.5 + 0.02 * n for n in (6, 12, 24)], True)
    assert slope == pytest.approx({FULL: 0.02})
    with pytest.raises(ArrowheadError, match="times of the mixes"):
        fit(mixes, [*times[:-1], float("nan")])


def test_prices_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "prices.json"
    save_prices(_prices(), path)
    assert load_prices(path) == _prices()
    data = json.loads(path.read_text())
    del data["prices"][0]["attention_ms"]["-1"]
    path.write_text(json.dumps(data))
    with pytest.raises(ArrowheadError, match="prices file .*prices/0/attention_ms"):
        load_prices(path)


def test_new_prices_replace_old_ones_of_one_device_alone() -> None:
    newer = _prices(full=0.3)
    more = Prices("a GPU", "0123", (Price(shape_of(OTHER, 1), {FULL: 1.0}, 0.0),))
    assert merged(_prices(), newer) == newer
    assert merged(_prices(), more).prices == _prices().prices + more.prices
    assert merged(_prices(), _prices("another")) == _prices("another")


def test_slow_modes_are_left_out_unmeasured_ones_refused_and_savings_hold_the_projections() -> None:
    prices = _prices()
    assert prices.worthwhile(MODULE, 1, (8, 4, 2, CACHED)) == (8, 4, CACHED)
    with pytest.raises(ArrowheadError, match=r"half windows \[2, 4, 8\]; expected \[16\]"):
        prices.worthwhile(MODULE, 1, (16, 8))
    savings = prices.savings(MODULE, 1, (8, CACHED))
    assert len(savings) == 24
    assert savings[0] == pytest.approx({8: 0.19, CACHED: 0.256})
    for module, rows in ((OTHER, 1), (MODULE, 2)):
        with pytest.raises(ArrowheadError, match="bench attention --price"):
            prices.find(module, rows)
