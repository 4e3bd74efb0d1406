"""What every mode of every head would err, noted while the pictures are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plans.models import AttentionModule
from plans.sample import SAMPLE_TOKENS, Sample, sample_of
from plans.scores import Moments, latest, moments
from plans.tables import HeadTables
from plans.tiles import CACHED, FULL, kept_pairs

Floats = NDArray[np.float64]
Savings = Mapping[str, Sequence[Mapping[int, float]]]  # module -> head -> mode -> what it saves


class Recorder:
    """Notes what every arrow, and every full output of 1..ages steps ago, would err at each step.

    Full outputs of the past are kept as a sample of rows: ages x rows x H x D items a module and
    row of the batch (see plans.memory). Nothing is copied from the device before the run is over.
    A step cache around the transformer may leave modules out of a step: there they repeat what they
    put out before, and nothing errs.
    """

    def __init__(
        self,
        modules: Sequence[AttentionModule],
        candidates: Mapping[str, Sequence[int]],
        steps: int,
        ages: int,
        image_tokens: int = SAMPLE_TOKENS,
    ) -> None:
        self.modules = tuple(modules)
        self.windows = tuple(sorted({w for row in candidates.values() for w in row if w >= 0}))
        self.ages = min(ages, steps - 1) if any(CACHED in c for c in candidates.values()) else 0
        self._own = {
            name: tuple(w for w in self.windows if w in modes) for name, modes in candidates.items()
        }
        self._tokens = image_tokens
        self._past: dict[str, Tensor] = {}  # [ages, B, rows, H, D], a ring
        self._moments: list[dict[str, Moments]] = [{} for _ in range(steps)]

    def sample(self, module: AttentionModule, device: torch.device) -> Sample:
        """Rows of a module that its errors are told from."""
        return sample_of(module, device, self._own[module.name], self._tokens)

    def note(
        self, step: int, module: AttentionModule, q: Tensor, k: Tensor, v: Tensor, seen: Tensor
    ) -> None:
        """Take down a module's errors at a step; seen: full attention on the sample."""
        sample = self.sample(module, q.device)
        past = self._past.get(module.name)
        if past is None:
            # Never written, a place of the ring errs by infinity.
            past = seen.new_full((self.ages, *seen.shape), torch.inf)
            self._past[module.name] = past
        for left_out in range(self._after(step, module.name), step if self.ages else 0):
            past[left_out % self.ages] = past[(left_out - 1) % self.ages]
        arrows = seen.new_empty(len(self._own[module.name]), *seen.shape)
        sample.arrows(q, k, v, seen, arrows)
        self._moments[step][module.name] = moments([arrows, past], seen, sample.weights)
        if self.ages:
            past[step % self.ages] = seen

    def moments(self) -> dict[str, Floats]:
        """Return what a finished run showed: "mean" and "spread" [N, R], "squared" [N, R, W + A].

        "ran": [N], 1 where no module was left out, else 0. With "pictures", how many were drawn,
        those of several runs make one table (`tables`).
        """
        rows = [[self._columns(step, module) for module in self.modules] for step in
                range(len(self._moments))]  # fmt: skip
        table = torch.stack([torch.cat(row, dim=1) for row in rows]).cpu().numpy()
        table = table.astype(np.float64).transpose(0, 2, 1)
        ran = np.array([float(len(found) == len(self.modules)) for found in self._moments])
        return {
            "mean": table[:, :, 0], "spread": table[:, :, 1], "squared": table[:, :, 2:],
            "ran": ran,
        }  # fmt: skip

    def _after(self, step: int, module: str) -> int:
        """The step after the last before `step` at which the module ran."""
        while step and module not in self._moments[step - 1]:
            step -= 1
        return step

    def _columns(self, step: int, module: AttentionModule) -> Tensor:
        """One module's moments in the order of the table: mean, spread, windows, ages: [C, H]."""
        found = latest(self._moments, step, module.name)
        own = self._own[module.name]
        missing = torch.full_like(found.mean, torch.inf)
        arrows = [found.squared[own.index(w)] if w in own else missing for w in self.windows]
        # The ring's place of what was written a number of steps ago.
        places = [len(own) + (step - age) % self.ages for age in range(1, self.ages + 1)]
        cached = [found.squared[place] for place in places]
        return torch.stack([found.mean, found.spread, *arrows, *cached])

    def tables(self, runs: Sequence[Mapping[str, Floats]], savings: Savings) -> HeadTables:
        """Return the errors that runs show together, and what modes save."""
        errors = pooled_errors(runs)
        rows = [head for module in self.modules for head in savings[module.name]]
        arrow = [[head.get(window, 0.0) for window in self.windows] for head in rows]
        errors[:, [CACHED not in head for head in rows], len(self.windows) :] = np.inf
        return HeadTables(
            heads=tuple(module.heads for module in self.modules),
            windows=self.windows,
            arrow=errors[:, :, : len(self.windows)],
            cached=errors[:, :, len(self.windows) :],
            arrow_saving=np.array(arrow).reshape(len(rows), len(self.windows)),
            cached_saving=np.array([head.get(CACHED, 0.0) for head in rows]),
        )


def pooled_errors(runs: Sequence[Mapping[str, Floats]]) -> Floats:
    """Return relative squared errors [N, R, C] over the pictures of all runs.

    The spread about the common mean is that about each run's own, and that of the means.
    """
    share = np.array([float(run["pictures"]) for run in runs])
    share /= share.sum()
    mean, spread, squared = (
        sum(part * run[name] for part, run in zip(share, runs, strict=True))
        for name in ("mean", "spread", "squared")
    )
    for part, run in zip(share, runs, strict=True):
        spread = spread + part * (run["mean"] - mean) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(squared == 0, 0.0, squared / spread[:, :, None])
    return np.nan_to_num(errors, nan=np.inf, posinf=np.inf)


def head_savings(module: AttentionModule, candidates: Sequence[int]) -> list[dict[int, float]]:
    """Return per head the query/key pairs that each candidate mode saves."""
    full = kept_pairs(module.layout, FULL, module.text_output)
    saved = {
        mode: float(full - kept_pairs(module.layout, mode, module.text_output))
        for mode in candidates
    }
    return [saved] * module.heads


def pairs_saved(savings: Savings, modes: Mapping[str, Sequence[int]]) -> float:
    """Return what one step's modes save."""
    return sum(
        savings[name][head].get(mode, 0.0)
        for name, row in modes.items()
        for head, mode in enumerate(row)
    )
