"""How good pictures are: against the uncompressed ones of the same seeds, and by their captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from plans.errors import ArrowheadError
from trt_runtime.quality_draw import Drawn
from trt_runtime.verify import IDENTICAL_DB, Accuracy

RESAMPLES = 2000

# (captions, pictures [n, 3, height, width] in -1..1) -> per caption one boolean per fact it states
Verdicts = Callable[[list[str], Tensor], Sequence[Sequence[bool]]]
Facts = list[list[bool]]
Numbers = NDArray[np.float64]
PerCaption = dict[str, list[float]]  # mark -> per caption, over its seeds


@dataclass(frozen=True)
class Interval:
    """A paired difference in points (hundredths of a share) with its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float


def paired_interval(
    right: Sequence[float], before: Sequence[float], facts: Sequence[float], *, seed: int = 0
) -> Interval:
    """Bootstrap the change of the share of right facts over captions.

    right, before: facts right per caption after and before; facts: how many it states. A caption is
    drawn with all its facts and all its pictures, which are not independent.
    """
    change = np.asarray(right, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    stated = np.asarray(facts, dtype=np.float64)
    low, high = bootstrap(change[:, None], stated, seed=seed)
    return Interval(float(100 * change.sum() / stated.sum()), 100 * low[0], 100 * high[0])


def bootstrap(values: Numbers, weights: Numbers, *, seed: int = 0) -> tuple[list[float], ...]:
    """Give the 95 % interval of sum(values) / sum(weights) over captions; values [captions, n]."""
    times = _resamples(len(values), seed)
    shares = times @ values / np.maximum(times @ weights, 1e-9)[:, None]
    low, high = np.percentile(shares, [2.5, 97.5], axis=0)
    return low.tolist(), high.tolist()


@lru_cache(maxsize=4)
def _resamples(count: int, seed: int) -> Numbers:
    """Give how often each of `count` captions is in each resample, [RESAMPLES, count]."""
    picks = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    return np.stack([np.bincount(row, minlength=count) for row in picks]).astype(np.float64)


def picture_likeness(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Give PSNR in dB (100 for equal pictures) and SSIM of each pair of pictures, [n] each.

    Both 8 bit [n, 3, height, width]. SSIM is that of scikit-image: windows of 7 x 7 pixels, sample
    covariance, mean over windows that lie within the picture, then over channels.
    """
    a, b = first.float(), second.float()
    error = (a - b).square().flatten(1).mean(1)
    psnr = 10 * torch.log10(255**2 / error)
    side = 7
    sample = side**2 / (side**2 - 1)

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    var_a = sample * (mean(a * a) - mean_a**2)
    var_b = sample * (mean(b * b) - mean_b**2)
    both = sample * (mean(a * b) - mean_a * mean_b)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    ssim = ssim / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return torch.where(error == 0, IDENTICAL_DB, psnr), ssim.flatten(1).mean(1)


class Judge:
    """Marks pictures against the uncompressed ones, at most `batch` at a time on `device`.

    Pictures are those of all captions, once for each seed. verdicts: facts per caption, for
    accuracy and its paired interval; accuracy: (captions, PIL pictures) -> dict of numbers, asked
    where there are no verdicts.
    """

    def __init__(
        self,
        captions: Sequence[str],
        dense: Drawn,
        *,
        accuracy: Accuracy | None = None,
        verdicts: Verdicts | None = None,
        device: Any = "cpu",
        batch: int = 125,
        seed: int = 0,
    ) -> None:
        self._captions = list(captions)
        self._seeds = len(dense.pictures) // len(self._captions)
        self._texts = self._captions * self._seeds
        self._dense = dense
        self._accuracy, self._verdicts = accuracy, verdicts
        self._device, self._batch, self._seed = device, batch, seed
        self._dense_facts = self._facts(dense)
        self.dense_marks, self.dense_by_caption = self._by_caption(dense, self._dense_facts)

    def marks(self, drawn: Drawn) -> tuple[dict[str, Any], PerCaption]:
        """Mark pictures made with a plan: likeness, accuracy, and its paired difference.

        Also gives marks per caption.
        """
        psnr, ssim, away = self._likeness(drawn)
        marks, by_caption = self._by_caption(drawn, self._facts(drawn))
        by_caption["psnr_db"] = self._mean_over_seeds(psnr)
        by_caption["ssim"] = self._mean_over_seeds(ssim)
        steps = [float(x) for x in away.mean(0)]
        return {
            "psnr_db": float(psnr.mean()),
            "ssim": float(ssim.mean()),
            "latent_relative_error": steps[-1],
            # Steps of another count are other times: only the last can be compared.
            "latent_error_per_step": steps if len(steps) > 1 else None,
            **marks,
        }, by_caption

    def _likeness(self, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
        likeness: list[tuple[Tensor, Tensor]] = []
        away: list[Tensor] = []
        same = drawn.latents.shape[1] == self._dense.latents.shape[1]
        steps = slice(None) if same else slice(-1, None)
        for part in self._parts():
            pictures = (x.pictures[part].to(self._device) for x in (drawn, self._dense))
            likeness.append(picture_likeness(*pictures))
            mine, dense = (x.latents[part, steps].to(self._device) for x in (drawn, self._dense))
            away.append(((mine - dense).norm(dim=2) / dense.norm(dim=2)).cpu().double())
        psnr, ssim = (torch.cat(part).cpu().double() for part in zip(*likeness, strict=True))
        return psnr, ssim, torch.cat(away)

    def _parts(self) -> Iterator[slice]:
        for first in range(0, len(self._texts), self._batch):
            yield slice(first, first + self._batch)

    def _mean_over_seeds(self, values: Tensor) -> list[float]:
        mean = values.unflatten(0, (self._seeds, -1)).mean(0)
        return [round(x, 4) for x in mean.tolist()]  # as they are kept in the file

    def _by_caption(self, drawn: Drawn, facts: Facts) -> tuple[dict[str, Any], PerCaption]:
        if self._verdicts is not None:
            return self._marks_by_fact(facts)
        if self._accuracy is None:
            return {}, {}
        images = [Image.fromarray(p) for p in drawn.pictures.permute(0, 2, 3, 1).numpy()]
        given = self._accuracy(self._texts, images)
        scores = {k: float(v) for k, v in given.items() if not math.isnan(v)}
        return {"scores": scores, "accuracy": scores.get("accuracy")}, {}

    def _marks_by_fact(self, facts: Facts) -> tuple[dict[str, Any], PerCaption]:
        counts = [len(row) for row in facts]
        if not sum(counts):
            raise ArrowheadError(
                "verdicts",
                got=f"no fact in {len(facts)} captions",
                expected="one boolean per fact that a caption states",
                fix="use captions that the scorer can read",
            )
        if counts != [len(row) for row in self._dense_facts]:
            raise ArrowheadError(
                "verdicts",
                got="another number of facts for the same captions",
                expected="the same facts of each caption, whatever its picture",
                fix="let the facts depend on the caption alone",
            )
        right, before, stated = (
            self._sum_over_seeds(x)
            for x in ([sum(row) for row in facts], [sum(row) for row in self._dense_facts], counts)
        )
        found = paired_interval(right, before, stated, seed=self._seed)
        return {
            "accuracy": sum(right) / sum(stated),
            "captions_right": sum(all(row) for row in facts) / len(facts),
            "facts": round(sum(stated)),
            "difference_points": found.difference,
            "interval_points": [found.low, found.high],
        }, {"right": right, "facts": stated}

    def _sum_over_seeds(self, counts: Sequence[int]) -> list[float]:
        return np.reshape(counts, (self._seeds, -1)).sum(0).astype(float).tolist()

    def _facts(self, drawn: Drawn) -> Facts:
        facts: Facts = []
        if self._verdicts is None:
            return facts
        for part in self._parts():
            pictures = drawn.pictures[part].to(self._device).float() / 127.5 - 1
            found = self._verdicts(self._texts[part], pictures)
            facts += [[bool(holds) for holds in row] for row in found]
        if len(facts) != len(self._texts):
            raise ArrowheadError(
                "verdicts",
                got=f"{len(facts)} rows for {len(self._texts)} captions",
                expected="one row per caption",
                fix="return a list of booleans for each caption, in order",
            )
        return facts
