"""Curves of `bench quality` against each other at equal cost, caption by caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trt_runtime.marks import Numbers, PerCaption, bootstrap
from trt_runtime.quality_settings import FEWER, OURS, OWN, PRICED, STACKED, VARIANTS

POINTS = 9  # costs a pair of curves is compared at
AXES = {
    "attention_flops_saved": "attention FLOPs saved",
    "transformer_flops_saved": "transformer FLOPs saved",
    "time_saved": "transformer time saved",
}
MARKS = {"right": "accuracy, points", "psnr_db": "PSNR, dB"}

Row = dict[str, Any]


class Curve(NamedTuple):
    """Marks of a variant's rows by what they save: saved [n], marks [n, captions]."""

    saved: Numbers
    marks: Numbers

    def at(self, saved: float) -> Numbers:
        """Give the marks per caption at a saving, between the two rows beside it."""
        right = int(np.searchsorted(self.saved, saved).clip(1, len(self.saved) - 1))
        a, b = self.saved[right - 1], self.saved[right]
        share = 0.0 if a == b else (saved - a) / (b - a)
        return (1 - share) * self.marks[right - 1] + share * self.marks[right]


def time_saved(report: Mapping[str, Any], row: Row) -> float:
    """Give the share of the transformer's time that a row saves."""
    dense = report["uncompressed"]["transformer_ms_per_picture"]
    return 1 - row["transformer_ms_per_picture"] / dense


def compare_curves(
    report: Mapping[str, Any], by_caption: Mapping[str, PerCaption], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Hold each of our curves (OWN) against every other at equal cost.

    At POINTS savings, evenly over the range that both curves cover from 0 on, each is interpolated
    between its rows, caption by caption; differences are ours less theirs, with the paired 95 %
    interval over captions. Where PSNR is the mark, the curves start at their first rows:
    the uncompressed picture's is not finite. Rows that turn two knobs (`stacked`, `fewer`) make a
    curve of those that none of them beats in saving and mark both.
    """
    found = []
    for mark in MARKS:
        for axis in AXES:
            curves = _curves(report, by_caption, axis, mark)
            for ours in OWN:
                for rival in curves:
                    if ours in curves and rival not in OWN:
                        weights = _weights(by_caption, mark, curves[ours])
                        pair = {"ours": ours, "rival": rival, "axis": axis, "mark": mark}
                        pair |= _compared(curves[ours], curves[rival], weights, seed)
                        found.append(pair)
    return found


def _curves(
    report: Mapping[str, Any], by_caption: Mapping[str, PerCaption], axis: str, mark: str
) -> dict[str, Curve]:
    dense = by_caption["uncompressed"].get(mark)
    curves = {}
    for variant in VARIANTS:
        points = [(0.0, dense)] if dense is not None else []
        for row in report["rows"]:
            marks = by_caption.get(row["name"], {}).get(mark)
            if row["variant"] == variant and marks is not None:
                saved = time_saved(report, row) if axis == "time_saved" else row[axis]
                points.append((saved, marks))
        points.sort(key=lambda point: point[0])
        if variant in (STACKED, FEWER):
            points = _unbeaten(points)
        if len(points) > 1:
            curves[variant] = Curve(
                np.array([x for x, _ in points]), np.array([y for _, y in points])
            )
    return curves


def _unbeaten(points: Sequence[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """Leave out points (saved, marks), ascending, after which one comes that is no worse.

    The first stays: what others are interpolated from.
    """
    kept: list[tuple[float, Any]] = []
    for saved, marks in reversed(points[1:]):
        if not kept or sum(marks) > sum(kept[-1][1]):
            kept.append((saved, marks))
    return [*points[:1], *kept[::-1]]


def _weights(by_caption: Mapping[str, PerCaption], mark: str, curve: Curve) -> Numbers:
    """Facts of each caption make accuracy a share in points; other marks are means."""
    if mark == "right":
        return np.array(by_caption["uncompressed"]["facts"]) / 100
    return np.ones(curve.marks.shape[1])


def _compared(ours: Curve, theirs: Curve, weights: Numbers, seed: int) -> dict[str, Any]:
    low_end = max(0.0, ours.saved[0], theirs.saved[0])
    high_end = min(ours.saved[-1], theirs.saved[-1])
    if high_end <= low_end:
        return {"saved": []}  # no cost that both have
    grid = np.linspace(low_end, high_end, POINTS + 1)[1:]
    values = np.stack([ours.at(x) - theirs.at(x) for x in grid], axis=1)
    low, high = bootstrap(values, weights, seed=seed)
    difference = (values.sum(0) / weights.sum()).tolist()
    middle = (grid >= low_end + (high_end - low_end) / 4) & (
        grid <= high_end - (high_end - low_end) / 4
    )
    return {
        "saved": grid.tolist(),
        "difference": difference,
        "interval": [list(pair) for pair in zip(low, high, strict=True)],
        "never_below": all(x >= 0 for x in high),
        "above_in_the_middle": all(np.array(difference)[middle] > 0),
        "clearly_above_in_the_middle": all(np.array(low)[middle] > 0),
    }


def verdict(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give for each rival, axis and mark the best of our plan, saving pairs or time, and stacked.

    Each other curve of ours is told by itself: with a choice among many one is soon never below.
    The better is one that is never below, then the one whose worst difference is better. Curves
    that share no cost with the rival come last.
    """
    best: dict[tuple[str, ...], tuple[tuple[bool, float], dict[str, Any]]] = {}
    for pair in comparisons:
        ours = OURS if pair["ours"] in (PRICED, STACKED) else pair["ours"]
        key = (ours, pair["rival"], pair["axis"], pair["mark"])
        rank = (False, -np.inf)
        if pair["saved"]:
            rank = (pair["never_below"], min(pair["difference"]))
        if key not in best or rank > best[key][0]:
            best[key] = rank, dict(pair)
    return [pair for _, pair in best.values()]
