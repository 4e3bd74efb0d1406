"""Show where the heads of a pipeline look at one denoising step, and how much they differ.

    python -m tests.testbed.attention_maps --model tests/testbed/tiny-sd3 --output maps.png

Draws one held-out caption, looks at q and k of every head at a step in the middle, and makes one
figure of what a plan lives on: heads that look next to where they stand, heads that look at the
text or everywhere, and heads that hardly change from step to step. Prints the range over heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plans.denoising import Denoising, denoise, dense_plan_of
from plans.models import AttentionModule
from plans.scores import attention, counted, relative_squared_errors
from plans.tiles import TokenLayout
from tests.testbed.evaluate import held_out_captions
from tests.testbed.models import T5_LENGTH
from tests.testbed.scenes import SIDE
from trt_runtime.pipeline import load_source_pipeline

BLOCK = 16  # tokens: half a row of the testbed's pictures
HALF_WINDOWS = (1, 2)  # blocks
REACH = 12  # rows and columns shown around a query
TILE = 4  # tokens averaged in a whole map
WEIGHTS, COLOURS = LogNorm(0.1, 1000), "magma"  # in units of even attention
DARK, LIGHT, INK, QUIET = "#16324f", "#7fa8cc", "#22262b", "#70767d"


@dataclass(frozen=True)
class Gaze:
    """Where one head looks in one picture at one step. Weights are in units of even attention, 1/S.

    around: mean weight of an image query on the image key so many rows and columns away,
    [2 rows - 1, 2 columns - 1], its own place in the middle. whole: every query and key, averaged
    over tiles. band: share of an image query's attention inside each of HALF_WINDOWS; text: on
    the text.
    """

    around: np.ndarray
    whole: np.ndarray
    band: tuple[float, ...]
    text: float


@dataclass(frozen=True)
class HeadView:
    """A head, where it looks, and its relative squared error if it kept its previous output."""

    module: AttentionModule
    head: int
    gaze: Gaze
    change: float


def relative_map(weights: Tensor, rows: int, columns: int) -> Tensor:
    """Average weights [V, V] over pairs of one offset, key - query: [2 rows - 1, 2 columns - 1]."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    down, right = (i.flatten() - i.flatten()[:, None] for i in (y, x))
    offset = ((down + rows - 1) * (2 * columns - 1) + right + columns - 1).flatten()
    mean = torch.bincount(offset, weights.flatten()) / torch.bincount(offset)
    return mean.unflatten(0, (2 * rows - 1, 2 * columns - 1))


def gaze_of(weights: Tensor, layout: TokenLayout, columns: int) -> Gaze:
    """Sum up one head's attention weights [S, S] in a picture of so many token columns."""
    image = slice(layout.image_offset, layout.image_offset + layout.image_tokens)
    text = slice(layout.text_offset, layout.text_offset + layout.text_tokens)
    inner = weights[image, image]
    block = torch.arange(layout.image_tokens) // layout.block
    apart = (block - block[:, None]).abs()
    around = relative_map(inner, layout.image_tokens // columns, columns)
    whole = F.avg_pool2d(weights[None], TILE, ceil_mode=True)[0]
    return Gaze(
        (around * layout.seq_len).numpy(),
        (whole * layout.seq_len).numpy(),
        tuple((inner * (apart <= w)).sum(1).mean().item() for w in HALF_WINDOWS),
        weights[image, text].sum(1).mean().item(),
    )


class WatchHeads:
    """Strategy that attends in full and views every head at one step, in the last row of the batch.

    Under classifier-free guidance that is the row with the caption.
    """

    def __init__(self, step: int, columns: int) -> None:
        self.views: list[HeadView] = []
        self._watched, self._columns, self._now = step, columns, 0
        self._before: dict[str, Tensor] = {}

    def begin_step(self, step: int) -> None:
        self._now = step

    def computed_heads(self, module: AttentionModule) -> tuple[int, ...]:
        return tuple(range(module.heads))

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        assert q is not None and k is not None and v is not None
        full = attention(q, k, v)
        row = full[-1:]
        if self._now == self._watched:
            before = counted(module, self._before[module.name])
            changes = relative_squared_errors(before, counted(module, row))
            for head, change in enumerate(changes.tolist()):
                logits = q[-1, :, head] @ k[-1, :, head].T * module.head_dim**-0.5
                seen = gaze_of(logits.softmax(-1), module.layout, self._columns)
                self.views.append(HeadView(module, head, seen, change))
        self._before[module.name] = row
        return full


def watch(pipe: Any, caption: str, steps: int, step: int, guidance_scale: float) -> list[HeadView]:
    """Draw a caption and view every head at `step`, 1 or later; in order of layer and head."""
    settings = Denoising([caption], steps, SIDE, SIDE, guidance_scale, T5_LENGTH, seed=0)
    modules = dense_plan_of(pipe, settings, BLOCK, None, None).modules
    heads = WatchHeads(step, SIDE // (2 * pipe.vae_scale_factor))
    denoise(pipe, settings, modules, heads, lambda step: None)
    return heads.views


def even_attention(layout: TokenLayout) -> tuple[float, ...]:
    """What each of HALF_WINDOWS and the text would get if all keys had the same weight."""
    block = np.arange(layout.image_tokens) // layout.block
    apart = np.abs(block - block[:, None])
    near = ((apart <= w).sum(1).mean() for w in HALF_WINDOWS)
    return tuple(float(n) / layout.seq_len for n in (*near, layout.text_tokens))


def examples(views: Sequence[HeadView]) -> dict[str, HeadView]:
    """Pick the clearest head of each of four kinds."""
    measures: dict[str, Callable[[Gaze], float]] = {
        "close by": lambda seen: seen.band[0],
        "a row up or down": lambda seen: seen.band[1] - seen.band[0],
        "at the text": lambda seen: seen.text,
        "everywhere": lambda seen: -seen.around.max() / seen.around.mean(),
    }
    return {kind: max(views, key=lambda v: most(v.gaze)) for kind, most in measures.items()}


def summary(views: Sequence[HeadView]) -> Table:
    """Tabulate the range of every measure over heads, beside that of even attention."""
    even = even_attention(views[0].module.layout)
    rows = [
        (f"within {w} block{'s' * (w > 1)} of {BLOCK} tokens", [v.gaze.band[i] for v in views])
        for i, w in enumerate(HALF_WINDOWS)
    ]
    rows.append(("on the text", [view.gaze.text for view in views]))
    table = Table(title="share of an image query's attention, over heads")
    for column in ("", "even", "lowest", "median", "highest"):
        table.add_column(column, justify="right" if column else "left")
    for (name, values), flat in zip(rows, even, strict=True):
        numbers = (flat, min(values), median(values), max(values))
        table.add_row(name, *(f"{100 * n:.1f} %" for n in numbers))
    table.add_section()
    changes = [view.change for view in views]
    numbers = (min(changes), median(changes), max(changes))
    table.add_row("change since the step before", "", *(f"{n:.4f}" for n in numbers))
    return table


def draw(views: Sequence[HeadView], title: str, caption: str, path: Path) -> None:
    """Draw views, in order of layer and head, as PNG."""
    heads = views[0].module.heads
    layers = len(views) // heads
    figure = Figure(figsize=(layers + 7.6, 8.4), dpi=120, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.add_gridspec(
        1, 2, width_ratios=(layers, 6.4), left=0.05, right=0.985, top=0.86, bottom=0.03, wspace=0.08
    )
    maps, _, bars = left.subgridspec(3, 1, height_ratios=(heads, 0.35, 2.9), hspace=0)
    _draw_around(figure, maps.subgridspec(heads, layers, hspace=0.05, wspace=0.05), views)
    _draw_bars(figure, bars.subgridspec(3, 1, hspace=0.5), views)
    _draw_whole(figure, right.subgridspec(2, 2, hspace=0.17, wspace=0.06), examples(views))
    about = f"an image query, in the middle, and its mean weight on keys up to {REACH} rows away"
    figure.text(0.05, 0.965, title, fontsize=13, color=INK)
    figure.text(0.05, 0.935, caption, fontsize=9, color=QUIET)
    figure.text(0.05, 0.895, about, fontsize=8, color=INK)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2).save(path, optimize=True)


def _draw_around(figure: Figure, grid: Any, views: Sequence[HeadView]) -> None:
    for i, view in enumerate(views):
        column, row = divmod(i, view.module.heads)
        axis = figure.add_subplot(grid[row, column])
        middle = [n // 2 for n in view.gaze.around.shape]
        near = tuple(slice(m - REACH, m + REACH + 1) for m in middle)
        axis.imshow(view.gaze.around[near], norm=WEIGHTS, cmap=COLOURS, aspect="auto")
        axis.set(xticks=[], yticks=[])
        if row == 0:
            axis.set_title(short_name(view.module), fontsize=8, color=QUIET)
        if column == 0:
            axis.set_ylabel(f"head {row}", fontsize=8, color=QUIET)


def _draw_bars(figure: Figure, grid: Any, views: Sequence[HeadView]) -> None:
    heads = views[0].module.heads
    layer, head = np.divmod(np.arange(len(views)), heads)
    x = layer + (head + 1) / (heads + 1)
    even = even_attention(views[0].module.layout)
    narrow, wide = zip(*(view.gaze.band for view in views), strict=True)
    on_text, changes = [view.gaze.text for view in views], [view.change for view in views]
    widths = f"{HALF_WINDOWS[0]} (dark) and {HALF_WINDOWS[1]} blocks of {BLOCK} tokens"
    panels = (
        (f"attention within {widths}; dashed: even attention", (wide, narrow), even[1]),
        ("attention on the text", (on_text,), even[2]),
        ("change of the output since the step before (relative squared error)", (changes,), None),
    )
    for i, (title, rows, flat) in enumerate(panels):
        axis = figure.add_subplot(grid[i])
        for values, colour in zip(rows, (LIGHT, DARK), strict=False):
            axis.bar(x, values, width=0.8 / (heads + 1), color=colour)
        if flat is not None:
            axis.axhline(flat, color=INK, linewidth=0.8, linestyle="--")
            axis.set(ylim=(0, 1), yticks=[0, 1])
        axis.set(xlim=(0, len(views) // heads), xticks=[])
        axis.set_title(title, fontsize=8, color=INK, loc="left", pad=3)
        axis.tick_params(labelsize=7, labelcolor=QUIET, length=2)
        axis.spines[["top", "right"]].set_visible(False)


def _draw_whole(figure: Figure, grid: Any, chosen: Mapping[str, HeadView]) -> None:
    for i, (kind, view) in enumerate(chosen.items()):
        axis = figure.add_subplot(grid[divmod(i, 2)])
        picture = axis.imshow(view.gaze.whole, norm=WEIGHTS, cmap=COLOURS, aspect="auto")
        axis.set_title(f"looks {kind}: {short_name(view.module)}, head {view.head}", fontsize=9)
        layout = view.module.layout
        ticks = [
            (layout.image_offset + layout.image_tokens / 2) / TILE,
            (layout.text_offset + layout.text_tokens / 2) / TILE,
        ]
        axis.set_xticks(ticks, ["image keys", "text"])
        axis.set_yticks(ticks, ["image queries", "text"], rotation=90, va="center")
        axis.label_outer()
        axis.tick_params(labelsize=7, labelcolor=QUIET, length=0)
    bar = figure.add_axes((0.79, 0.977, 0.195, 0.013))
    figure.colorbar(picture, cax=bar, orientation="horizontal", extend="both")
    bar.tick_params(labelsize=7, labelcolor=QUIET, pad=2)
    bar.minorticks_off()
    figure.text(0.78, 0.975, "weight, even attention = 1", ha="right", fontsize=8, color=INK)


def short_name(module: AttentionModule) -> str:
    """Give a diffusers attention module's kind and number, as "joint 3"."""
    kind = "single" if module.name.startswith("single") else "joint"
    return f"{kind} {module.name.split('.')[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("maps.png"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--step", type=int, help="the one to look at; default: the middle one")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--caption", type=int, default=0, help="number of a held-out caption")
    args = parser.parse_args()
    step = args.steps // 2 if args.step is None else args.step
    if not 1 <= step < args.steps:
        parser.error(f"--step | got {step}; expected 1 to {args.steps - 1}: it has one before it")
    caption = held_out_captions(args.caption + 1)[-1]
    pipe = load_source_pipeline(str(args.model), dtype=torch.float32)
    views = watch(pipe, caption, args.steps, step, args.guidance)
    draw(views, f"{args.model.name}, step {step} of {args.steps}", caption, args.output)
    Console().print(summary(views))


if __name__ == "__main__":
    main()
