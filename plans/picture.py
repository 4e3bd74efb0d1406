"""One picture of a plan: layers x heads over steps, coloured by mode."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from plans.accounting import account
from plans.errors import ArrowheadError, atomic_write
from plans.plan import Plan
from plans.tiles import CACHED, FULL

_CACHED_COLOUR = "#e9e4d8"
_FULL_COLOUR = "#1f3a5f"
_ARROW_MAP = "YlGnBu"
_INK, _QUIET = "#22262b", "#70767d"
_LEFT = 1.1  # inches left of the first step: room for the labels


def plan_picture(plan: Plan, path: Path | str) -> None:
    """Draw a plan as PNG or SVG, by the path's suffix.

    Rows are layers and in them heads, columns steps; above them the bucket of each step, below
    them the share of attention each step saves.
    """
    import matplotlib

    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ArrowheadError(
            f"picture {path}", got=path.suffix, expected=".png or .svg", fix="rename the file"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sum(module.heads for module in plan.modules)
    gaps = len(plan.modules) - 1
    # Inches: 24 heads of 57 layers and 4 of 6 must both be seen, on a page that can be scrolled.
    row_height = min(0.13, max(0.016, 16 / rows))
    body = rows * row_height + gaps * row_height * _gap_rows(plan)
    width = min(15.0, max(7.0, 2.0 + 0.24 * plan.steps))
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 8, "svg.hashsalt": ""}):
        figure = Figure(figsize=(width, body + 2.7), facecolor="white")
        FigureCanvasAgg(figure)
        heights = [0.18, body, 0.6]
        top, bottom = 0.95 / (body + 2.7), 0.42 / (body + 2.7)
        axes = figure.subplots(
            3, 1, sharex=True, gridspec_kw={"height_ratios": heights, "hspace": 0.35 / sum(heights)}
        )
        figure.subplots_adjust(
            left=_LEFT / width, right=1 - 0.25 / width, top=1 - top, bottom=bottom
        )
        _draw_buckets(axes[0], plan)
        colours = _draw_modes(axes[1], plan)
        _draw_saving(axes[2], plan)
        _draw_words(figure, plan, colours, body + 2.7, width)
        data = io.BytesIO()
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(data, format=path.suffix[1:], dpi=160, metadata=metadata)
    atomic_write(path, data.getvalue())


def _gap_rows(plan: Plan) -> float:
    """White space between layers, in rows."""
    return 0.12 * plan.modules[0].heads


def _colours(plan: Plan) -> dict[int, Any]:
    from matplotlib import colormaps

    windows = sorted({m for b in plan.buckets for row in b.modes.values() for m in row if m >= 0})
    shades = np.linspace(0.28, 0.72, len(windows)) if len(windows) > 1 else [0.5]
    arrows = {w: colormaps[_ARROW_MAP](shade) for w, shade in zip(windows, shades, strict=False)}
    return {CACHED: _CACHED_COLOUR, **arrows, FULL: _FULL_COLOUR}


def _draw_buckets(axis: Any, plan: Plan) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    axis.set_xlim(0, plan.steps)
    axis.set_ylim(0, 1)
    tints = colormaps["Pastel2"]
    for step, bucket in enumerate(plan.schedule):
        axis.add_patch(Rectangle((step, 0), 1, 1, facecolor=tints(bucket % 8), edgecolor="white"))
        axis.text(step + 0.5, 0.44, str(bucket), ha="center", va="center", color=_INK, fontsize=7)
    axis.set_yticks([0.5], ["bucket"])
    _quiet(axis)


def _draw_modes(axis: Any, plan: Plan) -> dict[int, Any]:
    from matplotlib.colors import to_rgb

    colours = _colours(plan)
    gap, top, ticks = _gap_rows(plan), 0.0, []
    for module in plan.modules:
        image = np.array(
            [
                [to_rgb(colours[plan.modes_at(s)[module.name][h]]) for s in range(plan.steps)]
                for h in range(module.heads)
            ]
        )
        extent = (0, plan.steps, top + module.heads, top)
        axis.imshow(image, extent=extent, aspect="auto", interpolation="nearest")
        ticks.append(top + module.heads / 2)
        top += module.heads + gap
    axis.set_ylim(top - gap, 0)
    axis.set_xlim(0, plan.steps)
    for step in range(1, plan.steps):
        axis.axvline(step, color="white", linewidth=0.4)
    size = 8 if len(plan.modules) <= 24 else 5.5
    labels = [_short(module.name) for module in plan.modules]
    axis.set_yticks(ticks, [f"layer {labels[0]}", *labels[1:]], fontsize=size)
    _quiet(axis)
    return colours


def _draw_saving(axis: Any, plan: Plan) -> None:
    saved = 100 * np.array(account(plan, 1)["per_step"])
    centres = np.arange(plan.steps) + 0.5
    axis.bar(centres, saved, width=0.82, color="#41827b")
    axis.set_ylim(0, 100)
    axis.set_yticks([0, 50, 100], ["0", "50", "100 %"])
    axis.set_ylabel("saved", rotation=0, ha="right", va="center", color=_QUIET, labelpad=4)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    every = max(1, round(plan.steps / 25))
    steps = range(0, plan.steps, every)
    axis.set_xticks([step + 0.5 for step in steps], [str(step) for step in steps])
    axis.set_xlabel("denoising step", color=_QUIET)
    _quiet(axis, labels=True)


def _draw_words(
    figure: Any, plan: Plan, colours: dict[int, Any], height: float, width: float
) -> None:
    from matplotlib.patches import Patch

    facts = account(plan, 1)
    source = plan.model.source
    name = Path(source).name if source else plan.model.architecture
    left = _LEFT / width
    figure.text(
        left, 1 - 0.24 / height, f"{name}, {plan.width} x {plan.height}",
        fontsize=12, fontweight="bold", color=_INK, va="center",
    )  # fmt: skip
    line = (
        f"{100 * facts['attention_flops_saved']:.1f} % of attention saved over {plan.steps} steps"
    )
    line += f" in {len(plan.buckets)} bucket{'s' if len(plan.buckets) > 1 else ''}"
    if plan.search and "delta" in plan.search:
        line += f", delta {plan.search['delta']:g}"
    figure.text(left, 1 - 0.46 / height, line, fontsize=9, color=_QUIET, va="center")
    labels = {CACHED: "cached", FULL: "full"}
    handles = [
        Patch(facecolor=colour, label=labels.get(mode, f"arrow ±{mode * plan.block} tokens"))
        for mode, colour in colours.items()
    ]
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(left - 0.03 / width, 1 - 0.7 / height),
        ncols=len(handles), frameon=False, fontsize=8, handlelength=1.1, handleheight=1.1,
        columnspacing=1.4, borderpad=0, labelcolor=_INK,
    )  # fmt: skip


def _short(name: str) -> str:
    """transformer_blocks.3.attn -> 3; attn2 and single blocks are told apart."""
    stem, index, attention = name.rsplit(".", 2)
    kind = "single " if stem.startswith("single") else ""
    return f"{kind}{index}{' attn2' if attention == 'attn2' else ''}"


def _quiet(axis: Any, labels: bool = False) -> None:
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0, colors=_QUIET, labelbottom=labels)
