"""What each mode of each head would err and save: what modes and schedules are chosen from."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from plans.errors import ArrowheadError, atomic_write

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What heads may be in the first step, which has no cache to read: all of them full, or arrows too.
FIRST_STEPS = ("full", "arrow")


@dataclass(frozen=True)
class HeadTables:
    """What each mode of each head would err and save; R heads, module by module.

    arrow: [N, R, W] errors of W half windows, ascending in blocks; cached: [N, R, A] errors of the
    full output of 1..A steps before; infinite where there is none. arrow_saving: [R, W] and
    cached_saving: [R], query/key pairs a step. A step that reads a cache errs by the cache's age
    and by the arrow it was computed with, as if the two were uncorrelated; times drift, [N, R],
    how much more it turned out to be. weights: [N, R], what every error of a step is multiplied by
    (plans.importance).
    """

    heads: tuple[int, ...]  # of each module
    windows: tuple[int, ...]
    arrow: Floats
    cached: Floats
    arrow_saving: Floats
    cached_saving: Floats
    drift: Floats = field(default_factory=lambda: np.ones((1, 1)))
    weights: Floats = field(default_factory=lambda: np.ones((1, 1)))

    @property
    def steps(self) -> int:
        return self.arrow.shape[0]

    @property
    def starts(self) -> Ints:
        """First row of each module."""
        return np.cumsum([0, *self.heads[:-1]])

    def under(self, first_step: str) -> HeadTables:
        """Return the tables that a choice under a rule of FIRST_STEPS is made from.

        "full": no head is within any bound at step 0 but in full.
        """
        check_first_step(first_step)
        if first_step == "arrow":
            return self
        arrow = self.arrow.copy()
        arrow[0] = np.inf
        return replace(self, arrow=arrow)

    def at_steps(self, steps: Sequence[int]) -> HeadTables:
        """Return the tables of some steps, as a run of no others; ages are counted in these."""
        kept = np.asarray(steps)
        drift, weights = (
            np.broadcast_to(x, self.arrow.shape[:2])[kept] for x in (self.drift, self.weights)
        )
        cached = np.full((len(kept), *self.cached.shape[1:]), np.inf)
        for place, step in enumerate(kept):
            for age, written in enumerate(kept[:place][::-1]):
                if max(age, step - written - 1) < self.cached.shape[2]:
                    cached[place, :, age] = self.cached[step, :, step - written - 1]
        return replace(self, arrow=self.arrow[kept], cached=cached, drift=drift, weights=weights)

    def of_module(self, index: int) -> HeadTables:
        """Return the tables of one module's heads."""
        first = int(self.starts[index])
        return self.of_rows(np.arange(first, first + self.heads[index]))

    def of_rows(self, rows: Ints) -> HeadTables:
        """Return the tables of some heads, as one module's."""
        drift, weights = (
            np.broadcast_to(x, self.arrow.shape[:2]) for x in (self.drift, self.weights)
        )
        return HeadTables(
            heads=(len(rows),), windows=self.windows,
            arrow=self.arrow[:, rows], cached=self.cached[:, rows],
            arrow_saving=self.arrow_saving[rows], cached_saving=self.cached_saving[rows],
            drift=drift[:, rows], weights=weights[:, rows],
        )  # fmt: skip


def check_first_step(first_step: str) -> None:
    """Raise ArrowheadError for a rule that is none of FIRST_STEPS."""
    if first_step not in FIRST_STEPS:
        raise ArrowheadError(
            "first step",
            got=first_step,
            expected=f"one of {', '.join(FIRST_STEPS)}",
            fix="name what heads may be in the first step",
        )


def save_tables(tables: HeadTables, path: Path) -> None:
    """Write a .npz file."""
    data = io.BytesIO()
    np.savez_compressed(data, **{f.name: getattr(tables, f.name) for f in fields(tables)})
    atomic_write(path, data.getvalue())


def load_tables(path: Path) -> HeadTables:
    """Read what save_tables wrote; raises ArrowheadError for another kind of file."""
    try:
        with np.load(path) as arrays:
            # Files of older searches have no weights: they were 1.
            names = [f.name for f in fields(HeadTables) if f.name in arrays or f.name != "weights"]
            found = {name: arrays[name] for name in names}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ArrowheadError(
            f"tables {path}",
            got=f"{type(error).__name__}: {error}",
            expected="a file that `arrowhead plan search --tables FILE` wrote",
            fix="record the tables anew",
        ) from error
    heads, windows = (tuple(int(n) for n in found.pop(name)) for name in ("heads", "windows"))
    return HeadTables(heads=heads, windows=windows, **found)
