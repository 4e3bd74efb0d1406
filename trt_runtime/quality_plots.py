"""The curves of `bench quality`, drawn: quality over what is saved, and errors over the steps."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plans.errors import atomic_write
from trt_runtime.quality_settings import DELTA, OURS, STEPS, VARIANTS

CURVES = "curves.png"
_DEPTH_POINTS = 8  # what lies deeper is in the table: drawn, it would press the rest flat
FOOTNOTE = (
    "Numbers at points: delta of the plan, threshold of FirstBlockCache, step count; other curves "
    "have the same in the same order. Bars: 95 % interval of the paired change against the "
    f"uncompressed pictures of the same seeds. Accuracy is drawn to {_DEPTH_POINTS} points below "
    "these."
)
_INK, _QUIET = "#22262b", "#70767d"
_MARGIN_POINTS = 2.0  # what a plan may cost in accuracy, drawn as a band
_NAMED = (OURS, STEPS, "first-block-cache")  # whose points say their setting; others would crowd
_SIZE = (15, 5.2)
_FONTS: Any = {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none"}

Row = dict[str, Any]
Value = Callable[[Row], float]


def _panels(figure: Any) -> Iterator[tuple[Any, str, Value]]:
    """Give axes, label and cost of three panels; what saves more is on the right in each."""
    attention, whole, duration = figure.subplots(1, 3)
    yield attention, "attention FLOPs saved, %", lambda row: 100 * row["attention_flops_saved"]
    yield (
        whole,
        "FLOPs of the whole transformer saved, %",
        lambda row: 100 * row["transformer_flops_saved"],
    )
    yield (
        duration,
        "transformer time, ms a picture",
        lambda row: row["transformer_ms_per_picture"],
    )
    duration.invert_xaxis()


def draw_curves(report: dict[str, Any], path: Path) -> None:
    """Draw accuracy (or SSIM, without a scorer) over the three costs, as PNG."""
    data = io.BytesIO()
    with _figure(_title(report)) as figure:
        _draw_quality(figure, report)
        _finish(figure)
        figure.savefig(data, format="png", dpi=130)
    atomic_write(path, data.getvalue())


def plots(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Give headings and pictures, as SVG elements."""
    found = []
    marks: tuple[tuple[str, str, Value], ...] = (
        ("PSNR", "PSNR to the uncompressed picture, dB", lambda row: row["psnr_db"]),
        ("SSIM", "SSIM to the uncompressed picture", lambda row: row["ssim"]),
        ("Error of the last latents", "relative error of the latents",
         lambda row: row["latent_relative_error"]),
    )  # fmt: skip
    with _figure() as figure:
        _draw_quality(figure, report)
        found.append(("Accuracy" if _dense(report) is not None else "Likeness", _svg(figure)))
    for heading, label, value in marks:
        with _figure() as figure:
            for axes, cost, x in _panels(figure):
                _draw_lines(axes, report["rows"], x, value)
                _label(axes, cost, label)
            found.append((heading, _svg(figure)))
    if any(row["latent_error_per_step"] for row in report["rows"]):
        with _figure() as figure:
            _draw_steps(figure, report["rows"])
            found.append(("Error of the latents at each step", _svg(figure, legend=False)))
    return found


@contextmanager
def _figure(title: str = "") -> Any:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_FONTS):
        figure = Figure(figsize=_SIZE, facecolor="white")
        FigureCanvasAgg(figure)
        if title:
            figure.suptitle(title, color=_INK, fontsize=11)
            figure.text(0.01, 0.012, FOOTNOTE, color=_QUIET, fontsize=8)
        yield figure


def _finish(figure: Any, *, legend: bool = True) -> None:
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    if legend and labels:
        figure.legend(handles, labels, loc="upper center", ncols=min(len(labels), 7),
                      frameon=False, bbox_to_anchor=(0.5, 0.96), fontsize=8)  # fmt: skip
    # Fixed margins: tight_layout lays all text out once more, which doubles the time.
    figure.subplots_adjust(
        left=0.045, right=0.99, bottom=0.14, top=0.83 if legend else 0.92, wspace=0.16
    )


def _svg(figure: Any, *, legend: bool = True) -> str:
    _finish(figure, legend=legend)
    data = io.StringIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    text = data.getvalue()
    return text[text.index("<svg") :]


def _title(report: dict[str, Any]) -> str:
    settings = report["settings"]
    return (
        f"{Path(str(settings['model'])).name}: {settings['captions']} captions x "
        f"{settings['seeds']} seeds, {settings['height']} x {settings['width']}, "
        f"{settings['num_inference_steps']} steps, block {settings['block']}, "
        f"{settings['max_buckets']} buckets at most, {settings['device']}"
    )


def _dense(report: dict[str, Any]) -> float | None:
    return report["uncompressed"].get("accuracy")


def _draw_quality(figure: Any, report: dict[str, Any]) -> None:
    dense = _dense(report)
    for index, (axes, cost, x) in enumerate(_panels(figure)):
        rows = report["rows"]
        if index == 0:  # over attention saved, steps and step caches say nothing of their own
            rows = [row for row in rows if VARIANTS[row["variant"]].knob == DELTA] or rows
        if dense is None:
            _draw_lines(axes, rows, x, lambda row: row["ssim"])
            _label(axes, cost, "SSIM to the uncompressed picture")
            continue
        axes.axhspan(
            100 * dense - _MARGIN_POINTS, 100 * dense, color="#eef2f7", zorder=0,
            label=f"within {_MARGIN_POINTS:g} points",
        )  # fmt: skip
        axes.axhline(100 * dense, color=_QUIET, linewidth=1, linestyle="--", label="uncompressed")
        _draw_lines(axes, rows, x, lambda row: 100 * row["accuracy"])
        _label(axes, cost, "facts of the captions that hold, %")
        best = max([dense, *(row["accuracy"] for row in rows)])
        lowest = max(axes.get_ylim()[0], 100 * dense - _DEPTH_POINTS)
        axes.set_ylim(lowest, 100 * best + 0.5)  # room for a row's interval


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_lines(axes: Any, rows: Sequence[Row], x: Value, y: Value) -> None:
    """Draw the lines of each variant, told apart by colour and marker."""
    for name, variant in VARIANTS.items():
        own = sorted((row for row in rows if row["variant"] == name), key=x)
        if not own:
            continue
        xs, ys = [x(row) for row in own], [y(row) for row in own]
        for i, line in enumerate(_lines(own, variant.knob)):
            axes.plot([x(row) for row in line], [y(row) for row in line], color=variant.colour,
                      marker=variant.marker, markersize=5, linewidth=1.3,
                      label=None if i else variant.label)  # fmt: skip
        if all("interval_points" in row and y(row) == 100 * row["accuracy"] for row in own):
            # The interval is of the difference: around the point it says how far zero is.
            spread = [
                [row["difference_points"] - row["interval_points"][0] for row in own],
                [row["interval_points"][1] - row["difference_points"] for row in own],
            ]
            axes.errorbar(xs, ys, yerr=spread, fmt="none", ecolor=variant.colour,
                          elinewidth=0.7, capsize=2)  # fmt: skip
        for row, at_x, at_y in zip(own, xs, ys, strict=True) if name in _NAMED else ():
            text = f"{row[variant.knob]:g}"
            axes.annotate(text, (at_x, at_y), textcoords="offset points", xytext=(4, 5),
                          fontsize=6, color=variant.colour, annotation_clip=True)  # fmt: skip


def _lines(rows: Sequence[Row], knob: str) -> list[list[Row]]:
    """Split rows into lines: one, or where another knob is turned too one for each delta."""
    if knob == DELTA:
        return [list(rows)]
    deltas = dict.fromkeys(row["delta"] for row in rows)
    return [[row for row in rows if row["delta"] == delta] for delta in deltas]


def _draw_steps(figure: Any, rows: Sequence[Row]) -> None:
    """Draw the error of the latents over the steps, a panel for each variant."""
    names = [
        name for name in VARIANTS
        if any(row["variant"] == name and row["latent_error_per_step"] for row in rows)
    ]  # fmt: skip
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        variant = VARIANTS[name]
        own = [row for row in rows if row["variant"] == name and row["latent_error_per_step"]]
        for index, row in enumerate(own):
            errors = row["latent_error_per_step"]
            axes.plot(range(1, len(errors) + 1), errors, color=variant.colour, linewidth=1.2,
                      alpha=0.35 + 0.65 * (index + 1) / len(own))  # fmt: skip
            axes.annotate(f"{row[variant.knob]:g}", (len(errors), errors[-1]), xytext=(2, 0),
                          textcoords="offset points", fontsize=6, color=variant.colour)  # fmt: skip
        axes.set_title(variant.label, fontsize=8)
        _label(axes, "step", "relative error of the latents" if axes is panels[0] else "")
