"""The report of `bench quality`: its file, its table and its picture."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError, atomic_write

FORMAT = "arrowhead.quality/1"
RESULTS, CURVES = "results.json", "curves.png"

# Variant -> colour and marker; told apart by both, also without colour.
_STYLE = {
    "both": ("#1f3a5f", "o"),
    "arrow": ("#2a8c82", "^"),
    "cache": ("#c9822b", "s"),
    "steps": ("#8c4a6b", "x"),
}
_LABELS = {
    "both": "arrow and cache",
    "arrow": "arrow only",
    "cache": "cache only",
    "steps": "fewer steps",
}
_INK, _QUIET = "#22262b", "#70767d"
_FOOTNOTE = (
    "Numbers at the points: delta of the plan, or step count. Bars: 95 % interval of the paired "
    "change against the uncompressed pictures of the same seeds."
)
_MARGIN_POINTS = 2.0  # what a plan may cost in accuracy, drawn as a band

Row = dict[str, Any]


def open_report(folder: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Start a report, or take up the one in `folder`; raise ArrowheadError where they differ."""
    path = folder / RESULTS
    empty = {"format": FORMAT, "settings": settings, "rows": []}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return empty
    if not resume:
        raise ArrowheadError(
            f"output {path}",
            got="results that are already there",
            expected="a new folder",
            fix="pass --resume to add the missing rows, or name another --output",
        )
    found = _read(path)
    differ = sorted(
        key
        for key in {*found["settings"], *settings}
        if found["settings"].get(key) != settings.get(key)
    )
    if differ:
        raise ArrowheadError(
            f"settings of {path}",
            got={key: settings.get(key) for key in differ},
            expected={key: found["settings"].get(key) for key in differ},
            fix="resume with the settings of the run, or name another --output",
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ArrowheadError(
            f"results {path}",
            got="another kind of file",
            expected=f"JSON of format {FORMAT}",
            fix="name another --output",
        )
    return found


def save_report(report: dict[str, Any], folder: Path) -> None:
    """Write results.json, whole or not at all."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(folder / RESULTS, text + "\n")


HEADER = (
    "row", "graphs", "attention saved", "FLOPs saved", "accuracy", "change [95 %], points",
    "PSNR dB", "SSIM", "latent error", "search s",
)  # fmt: skip


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Give the cells of every row, the uncompressed pictures first."""
    first = report.get("uncompressed", {})
    dense = ("uncompressed", "", "0.0 %", "0.0 %", _share(first.get("accuracy")), *("",) * 5)
    rows: list[tuple[str, ...]] = [dense]
    for row in sorted(report["rows"], key=_order):
        change = ""
        if "interval_points" in row:
            low, high = row["interval_points"]
            change = f"{row['difference_points']:+.1f} [{low:+.1f}, {high:+.1f}]"
        rows.append(
            (
                row["name"],
                str(row.get("buckets", "")),
                _share(row["attention_flops_saved"]),
                _share(row["transformer_flops_saved"]),
                _share(row.get("accuracy")),
                change,
                f"{row['psnr_db']:.2f}",
                f"{row['ssim']:.4f}",
                f"{row['latent_relative_error']:.3f}",
                f"{row['search_seconds']:.1f}" if "search_seconds" in row else "",
            )
        )
    return rows


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _order(row: Row) -> tuple[int, float]:
    return list(_STYLE).index(row["variant"]), row["delta"] or -row["steps"]


def draw_curves(report: dict[str, Any], path: Path) -> None:
    """Draw accuracy (or SSIM, without a scorer) and PSNR over what is saved, as PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report["rows"]
    plans = [row for row in rows if row["variant"] != "steps"]
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(14, 4.9), facecolor="white")
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3)
        # Deltas are named where the plans have room; beside steps they crowd at the left.
        _draw_quality(left, plans, "attention_flops_saved", plans, report)
        left.set_xlabel("attention FLOPs saved, %")
        named = [row for row in rows if row["variant"] == "steps"]
        _draw_quality(middle, rows, "transformer_flops_saved", named, report)
        middle.set_xlabel("FLOPs of the whole transformer saved, %")
        _draw_lines(right, rows, "transformer_flops_saved", lambda row: row["psnr_db"], rows)
        right.set_xlabel("FLOPs of the whole transformer saved, %")
        right.set_ylabel("PSNR to the uncompressed picture, dB")
        for axes in (left, middle, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e6e6e6", linewidth=0.6)
            axes.set_axisbelow(True)
        handles, labels = middle.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False,
                      bbox_to_anchor=(0.5, 0.93))  # fmt: skip
        figure.suptitle(_title(report), color=_INK, fontsize=11)
        figure.text(0.01, 0.012, _FOOTNOTE, color=_QUIET, fontsize=8)
        figure.tight_layout(rect=(0, 0.03, 1, 0.90))
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=130)
    atomic_write(path, data.getvalue())


def _title(report: dict[str, Any]) -> str:
    settings = report["settings"]
    return (
        f"{Path(str(settings['model'])).name}: {settings['captions']} captions, "
        f"{settings['height']} x {settings['width']}, {settings['num_inference_steps']} steps, "
        f"block {settings['block']}, {settings['max_buckets']} buckets at most, "
        f"{settings['device']}"
    )


def _draw_quality(
    axes: Any, rows: Sequence[Row], key: str, named: Sequence[Row], report: dict[str, Any]
) -> None:
    dense = report.get("uncompressed", {}).get("accuracy")
    if dense is None:
        _draw_lines(axes, rows, key, lambda row: row["ssim"], named)
        axes.set_ylabel("SSIM to the uncompressed picture")
        return
    axes.axhspan(
        100 * dense - _MARGIN_POINTS, 100 * dense, color="#eef2f7", zorder=0,
        label=f"within {_MARGIN_POINTS:g} points",
    )  # fmt: skip
    axes.axhline(100 * dense, color=_QUIET, linewidth=1, linestyle="--", label="uncompressed")
    _draw_lines(axes, rows, key, lambda row: 100 * row["accuracy"], named, with_interval=True)
    axes.set_ylabel("facts of the captions that hold, %")


def _draw_lines(
    axes: Any,
    rows: Sequence[Row],
    key: str,
    value: Callable[[Row], float],
    named: Sequence[Row],
    *,
    with_interval: bool = False,
) -> None:
    """Draw one line per variant; `named` rows say their delta, or their step count."""
    for variant, (colour, marker) in _STYLE.items():
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda r: r[key])
        if not own:
            continue
        x = [100 * row[key] for row in own]
        y = [value(row) for row in own]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.4,
                  label=_LABELS[variant])  # fmt: skip
        if with_interval and all("interval_points" in row for row in own):
            # The interval is of the difference: around the point it says how far zero is.
            spread = [
                [row["difference_points"] - row["interval_points"][0] for row in own],
                [row["interval_points"][1] - row["difference_points"] for row in own],
            ]
            axes.errorbar(x, y, yerr=spread, fmt="none", ecolor=colour, elinewidth=0.8, capsize=2)
        for row, at_x, at_y in zip(own, x, y, strict=True):
            if row not in named:
                continue
            text = f"{row['steps']}" if row["delta"] is None else f"{row['delta']:g}"
            axes.annotate(text, (at_x, at_y), textcoords="offset points", xytext=(4, 5),
                          fontsize=7, color=colour)  # fmt: skip
