"""What `bench quality` draws and searches: its settings and its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from plans.errors import ArrowheadError

CANDIDATES = {"both": ("arrow", "cache"), "arrow": ("arrow",), "cache": ("cache",)}
STEPS = "steps"
VARIANTS = (*CANDIDATES, STEPS)
DELTAS = (0.05, 0.1, 0.2, 0.4, 0.8)
FEWER_STEPS = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8)  # of the step count


@dataclass(frozen=True)
class Settings:
    """What is drawn and searched; picture i has the noise of seed + i in every row.

    calibration: the search's prompts, none of them among the captions; its noise is other noise.
    fewer_steps: step counts of the variant "steps"; none: FEWER_STEPS of `steps`.
    """

    captions: tuple[str, ...]
    calibration: tuple[str, ...]
    steps: int
    height: int
    width: int
    guidance_scale: float
    max_sequence_length: int | None = None
    block: int = 128
    max_buckets: int = 6
    deltas: tuple[float, ...] = DELTAS
    variants: tuple[str, ...] = VARIANTS
    fewer_steps: tuple[int, ...] = ()
    batch: int = 8
    seed: int = 0
    source: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.variants) - set(VARIANTS))
        shared = [caption for caption in self.calibration if caption in set(self.captions)]
        counts = [n for n in self.fewer_steps if not 0 < n < self.steps]
        for subject, got, expected, fix in (
            ("variants", unknown, f"some of {', '.join(VARIANTS)}", "remove the others"),
            ("captions", [] if self.captions else ["none"], "one or more", "give a file of them"),
            ("pictures of one call", [n for n in (self.batch,) if n < 1], "1 or more", "--batch 8"),
            (
                "calibration prompts",
                shared,
                "prompts that are not marked",
                "search on captions of their own: --calibration-prompts FILE",
            ),
            ("fewer steps", counts, f"counts in 1..{self.steps - 1}", "drop the others"),
        ):
            if got:
                raise ArrowheadError(subject, got=got, expected=expected, fix=fix)


@dataclass(frozen=True)
class Point:
    """One row to be: a search with a bound, or a step count."""

    variant: str
    delta: float | None
    steps: int

    @property
    def key(self) -> tuple[str, float | None, int]:
        return (self.variant, self.delta, self.steps)

    @property
    def name(self) -> str:
        if self.delta is None:
            return f"{self.steps} steps"
        return f"{self.variant}, delta {self.delta:g}"


def points(settings: Settings) -> Iterator[Point]:
    """Give the rows in the order they are made."""
    for delta in settings.deltas:
        for variant in settings.variants:
            if variant != STEPS:
                yield Point(variant, delta, settings.steps)
    if STEPS in settings.variants:
        usual = {int(settings.steps * share) for share in FEWER_STEPS} - {0}
        for steps in sorted(set(settings.fewer_steps) or usual, reverse=True):
            yield Point(STEPS, None, steps)


def calibration_seed(settings: Settings) -> int:
    """Give the search noise that no marked picture starts from."""
    return settings.seed + len(settings.captions)
