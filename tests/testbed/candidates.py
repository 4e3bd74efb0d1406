"""What other candidates would bring a search: other bands, two dimensions, younger caches.

    python -m tests.testbed.candidates --model tests/testbed/tiny-sd3 --steps 6 --guidance-scale 3
    python -m tests.testbed.candidates --model tests/testbed/tiny-flux --steps 8

Records, over dense runs of calibration prompts, what every candidate of every head would err at
every step, and tells what a plan of a graph a step saves within the same bound (method pooled, by
the tables) from each set of candidates; once for each seed.

A band is a run of blocks of BLOCK tokens in the picture's order, half a row each, as plans have it.
A band of two dimensions is a rectangle of tiles, as many tokens each, in tiles' order: so many
tiles up and down, so many left and right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plans.denoising import Denoising, denoise, dense_plan_of
from plans.models import AttentionModule
from plans.pooled import choose_pooled
from plans.scores import counted, relative_squared_errors
from plans.tables import HeadTables
from tests.testbed.models import T5_LENGTH
from tests.testbed.scenes import SIDE
from trt_runtime.pipeline import load_source_pipeline

BLOCK, TILE = 16, 4  # tokens of a block; rows and columns of a tile
WINDOWS = (1, 2, 4)  # half windows in blocks, the search's own: bands of V/32, V/16, V/8 tokens
WIDE, VERY_WIDE = 8, 16  # V/4, V/2
RECTANGLES = ((0, 1), (1, 0), (0, 2), (2, 0), (1, 1))  # 48, 48, 80, 80 and 144 keys, as WINDOWS
Candidate = int | tuple[int, int]
CANDIDATES: tuple[Candidate, ...] = (*WINDOWS, WIDE, VERY_WIDE, *RECTANGLES)


def near(candidate: Candidate, tokens: int) -> Tensor:
    """Which image keys an image query keeps: bool [V, V]."""
    token = torch.arange(tokens)
    if isinstance(candidate, int):
        block = token // BLOCK
        return (block - block[:, None]).abs() <= candidate
    side = round(tokens**0.5)
    rows, columns = (place // TILE for place in (token // side, token % side))
    down, right = ((x - x[:, None]).abs() for x in (rows, columns))
    return (down <= candidate[0]) & (right <= candidate[1])


def mask_of(candidate: Candidate, module: AttentionModule) -> Tensor:
    """Which keys each query keeps, text in full: bool [S, S]."""
    layout = module.layout
    mask = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool)
    image = slice(layout.image_offset, layout.image_offset + layout.image_tokens)
    mask[image, image] = near(candidate, layout.image_tokens)
    return mask


class RecordCandidates:
    """Strategy that attends in full and notes what each candidate and each age would err."""

    def __init__(self, modules: Iterable[AttentionModule], steps: int) -> None:
        self.modules, self._steps, self._now = tuple(modules), steps, 0
        self._masks = {m.name: [mask_of(c, m) for c in CANDIDATES] for m in self.modules}
        self._past: dict[str, list[Tensor]] = {module.name: [] for module in self.modules}
        self._rows = {m.name: slice(i * m.heads, (i + 1) * m.heads)
                      for i, m in enumerate(self.modules)}  # fmt: skip
        heads = sum(module.heads for module in self.modules)
        self.arrow = np.full((steps, heads, len(CANDIDATES)), np.inf)
        self.cached = np.full((steps, heads, steps - 1), np.inf)

    def begin_step(self, step: int) -> None:
        self._now = step

    def computed_heads(self, module: AttentionModule) -> tuple[int, ...]:
        return tuple(range(module.heads))

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        assert q is not None and k is not None and v is not None
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]

        def attention(mask: Tensor | None = None) -> Tensor:
            return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)

        full, rows = attention(), self._rows[module.name]
        seen = counted(module, full)

        def error(output: Tensor) -> np.ndarray:
            return relative_squared_errors(output, seen).numpy()

        for i, mask in enumerate(self._masks[module.name]):
            self.arrow[self._now, rows, i] = error(counted(module, attention(mask)))
        past = self._past[module.name]
        for age, output in enumerate(reversed(past)):
            self.cached[self._now, rows, age] = error(output)
        past.append(seen)
        return full

    def tables(self) -> HeadTables:
        """Give what was noted, with all candidates, in their order."""
        savings, whole = [], []
        for module in self.modules:
            queries = slice(None)
            if not module.text_output:
                start = module.layout.image_offset
                queries = slice(start, start + module.layout.image_tokens)
            kept = [int(mask[queries].sum()) for mask in self._masks[module.name]]
            pairs = self._masks[module.name][0][queries].numel()
            savings += [[pairs - n for n in kept]] * module.heads
            whole += [pairs] * module.heads
        return HeadTables(
            tuple(module.heads for module in self.modules), tuple(range(len(CANDIDATES))),
            self.arrow, self.cached, np.array(savings, float), np.array(whole, float),
        )  # fmt: skip


def saved(
    tables: HeadTables, candidates: Iterable[Candidate], delta: float, ages: int | None = None
) -> float:
    """Give the share of attention that a plan from some candidates saves within a bound."""
    kept = sorted(
        (CANDIDATES.index(candidate) for candidate in candidates),
        key=lambda i: -tables.arrow_saving[0, i],
    )
    of_these = HeadTables(
        tables.heads, tuple(range(len(kept))), tables.arrow[:, :, kept],
        tables.cached[:, :, :ages], tables.arrow_saving[:, kept], tables.cached_saving,
    )  # fmt: skip
    choice = choose_pooled(of_these.under("full"), delta, 1.5, tables.steps)
    return float(choice.saving / (tables.steps * tables.cached_saving.sum()))


SETS: dict[str, Callable[[HeadTables, float], float]] = {
    "bands of V/8, V/16, V/32": lambda t, d: saved(t, WINDOWS, d),
    "V/8 alone": lambda t, d: saved(t, WINDOWS[-1:], d),
    "V/4 too": lambda t, d: saved(t, (*WINDOWS, WIDE), d),
    "V/4 and V/2 too": lambda t, d: saved(t, (*WINDOWS, WIDE, VERY_WIDE), d),
    "two dimensions instead": lambda t, d: saved(t, RECTANGLES, d),
    "two dimensions too": lambda t, d: saved(t, (*WINDOWS, *RECTANGLES), d),
    "all of these": lambda t, d: saved(t, CANDIDATES, d),
    "caches 1 step old": lambda t, d: saved(t, WINDOWS, d, 1),
    "caches 2 steps old": lambda t, d: saved(t, WINDOWS, d, 2),
    "caches 3 steps old": lambda t, d: saved(t, WINDOWS, d, 3),
}


def record(pipe: Any, prompts: list[str], steps: int, guidance: float, seed: int) -> HeadTables:
    """Run the pipeline densely and give every candidate's errors."""
    settings = Denoising(prompts, steps, SIDE, SIDE, guidance, T5_LENGTH, seed)
    modules = dense_plan_of(pipe, settings, BLOCK, None, None).modules
    heads = RecordCandidates(modules, steps)
    denoise(pipe, settings, modules, heads, lambda step: None)
    return heads.tables()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--guidance-scale", type=float, default=3.5)
    parser.add_argument("--num-prompts", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.2, 0.4])
    given = parser.parse_args()
    pipe = load_source_pipeline(str(given.model), dtype=torch.float32)
    lines = (given.model / "calibration_prompts.txt").read_text().splitlines()
    runs = []
    with torch.no_grad():
        for seed in range(given.seeds):
            print(f"seed {seed}", file=sys.stderr)
            # Other prompts for each seed, so that the spread is over both.
            first = seed * given.num_prompts % len(lines)
            prompts = [lines[(first + i) % len(lines)] for i in range(given.num_prompts)]
            runs.append(record(pipe, prompts, given.steps, given.guidance_scale, seed))
    table = Table(title=f"{given.model.name}: attention saved within a bound, {given.seeds} seeds")
    table.add_column("candidates")
    for delta in given.deltas:
        table.add_column(f"delta {delta:g}", justify="right")
    for name, choose in SETS.items():
        shares = [[100 * choose(tables, delta) for tables in runs] for delta in given.deltas]
        table.add_row(name, *(f"{np.mean(x):.1f} % ({min(x):.1f} to {max(x):.1f})" for x in shares))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
