"""Curves against each other at equal cost, and the plans that stand beside ours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from plans.plan import check_plan
from tests import tiny
from trt_runtime.quality_curves import compare_curves, verdict
from trt_runtime.quality_variants import shuffle_modes

CAPTIONS, FACTS = 40, 5
RNG = np.random.default_rng(0)
DENSE = RNG.integers(2, FACTS + 1, CAPTIONS).astype(float)


def report(**variants: list[tuple[float, float]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make rows (saved, facts lost per caption) of some variants."""
    rows = []
    by_caption = {"uncompressed": {"right": DENSE.tolist(), "facts": [float(FACTS)] * CAPTIONS}}
    for variant, points in variants.items():
        for saved, lost in points:
            name = f"{variant} {saved}"
            rows.append(
                {"name": name, "variant": variant, "attention_flops_saved": saved,
                 "transformer_flops_saved": saved / 2, "transformer_ms_per_picture": 2 - saved}
            )  # fmt: skip
            by_caption[name] = {"right": (DENSE - lost).tolist()}
    return {"uncompressed": {"transformer_ms_per_picture": 2.0}, "rows": rows}, by_caption


def test_curves_are_compared_between_their_rows() -> None:
    made = report(both=[(0.4, 0.0), (0.8, 0.4)], paper=[(0.5, 1.0)])
    pairs = {pair["axis"]: pair for pair in compare_curves(*made)}
    assert set(pairs) == {"attention_flops_saved", "transformer_flops_saved", "time_saved"}
    pair = pairs["attention_flops_saved"]
    assert (pair["ours"], pair["rival"]) == ("both", "paper")
    assert pair["saved"][-1] == 0.5  # where the shorter curve ends
    # Ours has lost a quarter of 0.4 facts, of five, at 0.5; theirs one.
    assert pair["difference"][-1] == pytest.approx(100 * (1 - 0.1) / FACTS)
    assert pair["interval"][-1] == pytest.approx([18, 18])  # all captions lose alike
    assert pair["never_below"] and pair["above_in_the_middle"]
    assert pairs["time_saved"]["saved"][-1] == pytest.approx(0.25)


def test_below_is_below_by_more_than_the_interval() -> None:
    noise = RNG.choice([-1.0, 1.0], CAPTIONS)
    made, by_caption = report(both=[(0.5, 0.0)], paper=[(0.5, 0.0)], layer=[(0.5, -0.5)])
    by_caption["both 0.5"]["right"] = (DENSE + noise - noise.mean() - 0.01).tolist()
    pairs = {
        pair["rival"]: pair
        for pair in compare_curves(made, by_caption)
        if pair["axis"] == "attention_flops_saved"
    }
    assert pairs["paper"]["never_below"] and not pairs["paper"]["above_in_the_middle"]
    assert not pairs["layer"]["never_below"]


def test_the_better_of_our_curves_stands_against_a_peer() -> None:
    made = report(both=[(0.5, 1.0)], stacked=[(0.5, 0.0)], **{"first-block-cache": [(0.5, 0.5)]})
    pairs = compare_curves(*made)
    assert {pair["ours"] for pair in pairs} == {"both", "stacked"}
    assert {(pair["rival"], pair["ours"]) for pair in verdict(pairs)} == {
        ("first-block-cache", "stacked")
    }


def test_rows_of_two_knobs_make_a_curve_of_the_unbeaten() -> None:
    rows = [(0.2, 0.5), (0.3, 0.1), (0.6, 2.0), (0.8, 1.0)]  # the first and third are beaten
    rival = {"first-block-cache": [(0.2, 0.2), (0.8, 0.8)]}
    for variant in ("stacked", "both"):
        made = report(**{variant: rows}, **rival)
        pair = next(p for p in compare_curves(*made) if p["axis"] == "time_saved")
        ours = np.interp(np.array(pair["saved"]) * 2, *zip(*_curve(variant, rows), strict=True))
        theirs = np.interp(np.array(pair["saved"]) * 2, (0, 0.2, 0.8), (0, 0.2, 0.8))
        assert pair["difference"] == pytest.approx(100 * (theirs - ours) / FACTS)


def _curve(variant: str, rows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(0.0, 0.0), *(rows if variant == "both" else (rows[1], rows[3]))]


def test_shuffled_plans_have_the_modes_of_each_step() -> None:
    plan = tiny.random_plan(tiny.tiny_sd3())
    made = shuffle_modes(plan, [1, 2])
    check_plan(made)
    assert made.schedule == plan.schedule and made.buckets[0] == plan.buckets[0]
    for mine, before in zip(made.buckets[1:], plan.buckets[1:], strict=True):
        assert mine != before
        counts = [Counter(mode for row in b.modes.values() for mode in row) for b in (mine, before)]
        assert counts[0] == counts[1]
    assert made == shuffle_modes(plan, [1, 2]) != shuffle_modes(plan, [1, 3])


def test_each_further_curve_of_ours_is_told_by_itself() -> None:
    """A rival is not held against the best of many curves."""
    pairs = [
        {"rival": "layer", "axis": "a", "mark": "m", "ours": ours, "saved": [0.1],
         "never_below": good, "difference": [1.0 if good else -1.0]}
        for ours, good in (("both", False), ("stacked", True), ("priced", False),
                           ("gradient", False), ("fewer", True))
    ]  # fmt: skip
    assert [pair["ours"] for pair in verdict(pairs)] == ["stacked", "gradient", "fewer"]
