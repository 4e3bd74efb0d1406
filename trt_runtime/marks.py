"""How good pictures are: against the uncompressed ones of the same seeds, and by their captions."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from plans.errors import ArrowheadError
from trt_runtime.verify import Accuracy, picture_quality

RESAMPLES = 2000

# (captions, pictures [n, 3, height, width] in -1..1) -> per caption one boolean per fact it states
Verdicts = Callable[[list[str], Tensor], Sequence[Sequence[bool]]]
Facts = list[list[bool]]


@dataclass(frozen=True)
class Drawn:
    """Pictures of one setting, one per caption, in the captions' order, on the CPU.

    pictures: 8 bit [n, 3, height, width]; latents: the last step's, fp32 [n, ...]; seconds: of all
    pipeline calls together.
    """

    pictures: Tensor
    latents: Tensor
    seconds: float

    def images(self) -> list[Image.Image]:
        return [Image.fromarray(p) for p in self.pictures.permute(0, 2, 3, 1).numpy()]


@dataclass(frozen=True)
class Interval:
    """A paired difference in points (hundredths of a share) with its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float


def paired_interval(
    right: Sequence[int], before: Sequence[int], facts: Sequence[int], *, seed: int = 0
) -> Interval:
    """Bootstrap the change of the share of right facts over captions.

    right, before: facts right per caption after and before; facts: how many it states. A caption is
    drawn with all its facts, which share a picture and are not independent.
    """
    change = np.asarray(right, dtype=np.int64) - np.asarray(before, dtype=np.int64)
    stated = np.asarray(facts, dtype=np.int64)
    picks = np.random.default_rng(seed).integers(0, len(change), (RESAMPLES, len(change)))
    shares = change[picks].sum(axis=1) / np.maximum(stated[picks].sum(axis=1), 1)
    low, high = np.percentile(100 * shares, [2.5, 97.5])
    return Interval(float(100 * change.sum() / stated.sum()), float(low), float(high))


class Judge:
    """Marks pictures against the uncompressed ones.

    accuracy: (captions, PIL pictures) -> dict of numbers. verdicts: facts per caption, for a paired
    interval; it gets tensors of at most `batch` pictures on `device`.
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
        self._dense = dense
        self._dense_images = dense.images()
        self._accuracy, self._verdicts = accuracy, verdicts
        self._device, self._batch, self._seed = device, batch, seed
        self._dense_facts = self._facts(dense)
        self.dense_marks = self._marks_by_caption(self._dense_images, self._dense_facts)

    def marks(self, drawn: Drawn) -> dict[str, Any]:
        """Mark pictures made with a plan: likeness, accuracy, and its paired difference."""
        images = drawn.images()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            likeness = list(pool.map(picture_quality, images, self._dense_images))
        away = (drawn.latents - self._dense.latents).flatten(1).norm(dim=1)
        size = self._dense.latents.flatten(1).norm(dim=1)
        return {
            "psnr_db": fmean(psnr for psnr, _ in likeness),
            "ssim": fmean(ssim for _, ssim in likeness),
            "latent_relative_error": float((away / size).mean()),
            **self._marks_by_caption(images, self._facts(drawn)),
        }

    def _marks_by_caption(self, images: list[Image.Image], facts: Facts) -> dict[str, Any]:
        marks: dict[str, Any] = {}
        if self._accuracy is not None:
            given = self._accuracy(self._captions, images)
            marks["scores"] = {k: float(v) for k, v in given.items() if not math.isnan(v)}
            if "accuracy" in given:
                marks["accuracy"] = marks["scores"].get("accuracy")
        if self._verdicts is not None:
            marks |= self._marks_by_fact(facts)
        return marks

    def _marks_by_fact(self, facts: Facts) -> dict[str, Any]:
        counts = [len(row) for row in facts]
        right = [sum(row) for row in facts]
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
        before = [sum(row) for row in self._dense_facts]
        found = paired_interval(right, before, counts, seed=self._seed)
        return {
            "accuracy": sum(right) / sum(counts),
            "facts": sum(counts),
            "difference_points": found.difference,
            "interval_points": [found.low, found.high],
        }

    def _facts(self, drawn: Drawn) -> Facts:
        facts: Facts = []
        if self._verdicts is None:
            return facts
        for first in range(0, len(self._captions), self._batch):
            part = drawn.pictures[first : first + self._batch].to(self._device)
            captions = self._captions[first : first + self._batch]
            found = self._verdicts(captions, part.float() / 127.5 - 1)
            facts += [[bool(holds) for holds in row] for row in found]
        if len(facts) != len(self._captions):
            raise ArrowheadError(
                "verdicts",
                got=f"{len(facts)} rows for {len(self._captions)} captions",
                expected="one row per caption",
                fix="return a list of booleans for each caption, in order",
            )
        return facts
