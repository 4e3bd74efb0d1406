"""What `bench quality` draws: its settings, its kinds of row, and its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from plans.errors import ArrowheadError
from plans.prices import Prices

DELTA, STEPS, THRESHOLD = "delta", "steps", "threshold"


class Variant(NamedTuple):
    """A kind of row: what is turned to save more, and how a curve of it is drawn.

    how: a sentence on what runs, for the report.
    """

    knob: str
    label: str
    colour: str
    marker: str
    how: str


OURS, PRICED, STACKED, FEWER = "both", "priced", "stacked", "fewer"
OWN = (OURS, PRICED, "gradient", FEWER, STACKED)  # what rivals are compared with
VARIANTS = {
    OURS: Variant(
        DELTA, "arrow and cache", "#1f3a5f", "o",
        "Modes of every head, buckets and schedule chosen together; delta bounds the mean of the "
        "errors over all steps and modules: one price of error for the whole run.",
    ),
    PRICED: Variant(
        DELTA, "saving milliseconds", "#2b6f9e", "H",
        "The search of `both` that saves the milliseconds of --prices in place of attention FLOPs; "
        "with prices the plans of `stacked` and `fewer` do so too.",
    ),
    "arrow": Variant(
        DELTA, "arrow only", "#2a8c82", "^", "The same search without cached heads."
    ),
    "cache": Variant(DELTA, "cache only", "#c9822b", "s", "The same search without arrows."),
    "wide": Variant(
        DELTA, "wider bands too", "#00838f", "X",
        "The search of `both` with bands of V/4 and V/2 image tokens beside V/8, V/16 and V/32.",
    ),
    "output": Variant(
        DELTA, "weighted in the module", "#4f6db5", "p",
        "The search of `both` with errors weighted by the head's share of what its module adds to "
        "the residual stream.",
    ),
    "stream": Variant(
        DELTA, "weighted by the stream", "#7a2f8f", "h",
        "The search of `both` with errors weighted by the energy that the head adds to the "
        "residual stream, of the stream's as the module leaves it.",
    ),
    "stream-dt": Variant(
        DELTA, "stream and step size", "#d1495b", "X",
        "The search of `both` with the weights of `stream` times the square of the step's sigma "
        "difference.",
    ),
    "gradient": Variant(
        DELTA, "weighted by gradients", "#0f6e4f", "d",
        "The search of `both` with errors weighted by how much the prediction moves with the "
        "head's output: one backward pass a step.",
    ),
    "joint": Variant(
        DELTA, "a bound each", "#e07a1f", ">",
        "The search of `both` with delta as the bound of each step and module, not of their mean.",
    ),
    "paper": Variant(
        DELTA, "published rule", "#b23a48", "D",
        "DiTFastAttnV2's rule: step by step, one bound delta for all modules and steps, "
        "c = 1.5, local relative squared error, a graph for each step.",
    ),
    "layer": Variant(
        DELTA, "layer-wise", "#6d8f3c", "v",
        "As V1 decides: all heads of a module share one mode at a step, chosen step by step "
        "under the same bound on the sum of their errors.",
    ),
    "random": Variant(
        DELTA, "random plan", "#8a8f98", "P",
        "The plan of `both` at this delta with the modes of each bucket shuffled over all heads "
        "of all modules: the same schedule, the same mix of modes at each step and, but for text "
        "rows the last module discards, the same attention FLOPs. Step 0 stays full, so that "
        "every cache is written before it is read.",
    ),
    STEPS: Variant(
        STEPS, "fewer steps", "#8c4a6b", "x", "The uncompressed model with a smaller step count."
    ),
    FEWER: Variant(
        STEPS, "plan and fewer steps", "#c2185b", "8",
        "The search of `both` at one delta and a smaller step count: the plan's steps are those of "
        "fewer steps, and save attention besides.",
    ),
    "first-block-cache": Variant(
        THRESHOLD, "FirstBlockCache", "#3d7dca", "<",
        "diffusers.hooks.FirstBlockCache: where the first block's residual changed by less than "
        "the threshold, the others' residual of the last computed step is added instead. It "
        "decides once a call, for the whole batch.",
    ),
    STACKED: Variant(
        THRESHOLD, "plan on FirstBlockCache", "#111111", "*",
        "The search of `both` with FirstBlockCache around the transformer, at some deltas and each "
        "threshold: errors are those of the steps it leaves, and the first block, which it "
        "decides by, caches no heads. A cached head takes the latest output there is.",
    ),
    "dbcache": Variant(
        THRESHOLD, "cache-dit DBCache", "#a05fc4", ">",
        "cache_dit.DBCache with one block before and one after (F1B1), a warm-up of one step and "
        "the threshold on the first block's residual: the last block is computed at every step. "
        "It decides once a call, for the whole batch.",
    ),
}  # fmt: skip
DELTAS = (0.05, 0.1, 0.2, 0.4, 0.8)
FEWER_STEPS = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8)  # of the step count
THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Settings:
    """What is drawn and searched; picture i has the noise of seed + i in every row.

    seeds: pictures of a caption; the second noise of all captions follows the first. calibration:
    the search's prompts, none of them among the captions; its noise is other noise. fewer_steps:
    step counts of the variant "steps"; none: FEWER_STEPS of `steps`. searches: of each plan found
    by a bound, each with noise of its own. thresholds: of the peers; stacked_deltas: of the plans
    that run with one, or with fewer steps; none: the middle one of deltas. prices: of calls of
    `batch` pictures, for the plans that save milliseconds: `priced`, and those at stacked_deltas.
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
    variants: tuple[str, ...] = tuple(VARIANTS)
    fewer_steps: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = THRESHOLDS
    stacked_deltas: tuple[float, ...] = ()
    searches: int = 1
    prices: Prices | None = None
    batch: int = 8
    seed: int = 0
    seeds: int = 1
    source: str | None = None
    revision: str | None = None

    @property
    def skipped(self) -> dict[str, str]:
        """Variants that cannot be made with these settings, with the reason."""
        if PRICED not in self.variants or self.prices is not None:
            return {}
        return {PRICED: "no prices: pass --prices on a GPU"}

    @property
    def pictures(self) -> int:
        return self.seeds * len(self.captions)

    @property
    def calibration_seed(self) -> int:
        """Search noise that no marked picture starts from."""
        return self.seed + self.pictures

    def search_seed(self, search: int) -> int:
        """Noise of a plan's search, counted from 0."""
        return self.calibration_seed + search * len(self.calibration)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.variants) - set(VARIANTS))
        shared = [caption for caption in self.calibration if caption in set(self.captions)]
        counts = [n for n in self.fewer_steps if not 0 < n < self.steps]
        for subject, got, expected, fix in (
            ("variants", unknown, f"some of {', '.join(VARIANTS)}", "remove the others"),
            ("captions", [] if self.captions else ["none"], "one or more", "give a file of them"),
            ("pictures of one call", [n for n in (self.batch,) if n < 1], "1 or more", "--batch 8"),
            ("pictures of a caption", [n for n in (self.seeds,) if n < 1], "1 or more",
             "--seeds 2"),
            ("searches of a plan", [n for n in (self.searches,) if n < 1], "1 or more",
             "--searches 4"),
            (
                "calibration prompts",
                shared,
                "prompts that are not marked",
                "search on captions of their own: --calibration-prompts FILE",
            ),
            ("fewer steps", counts, f"counts in 1..{self.steps - 1}", "drop the others"),
        ):  # fmt: skip
            if got:
                raise ArrowheadError(subject, got=got, expected=expected, fix=fix)


@dataclass(frozen=True)
class Point:
    """One row to be: a search with a bound, a step count or a peer's threshold."""

    variant: str
    steps: int
    delta: float | None = None
    threshold: float | None = None
    search: int = 0

    @property
    def key(self) -> tuple[str | float | None, ...]:
        again = (self.search,) if self.search else ()
        return (self.variant, self.steps, self.delta, self.threshold, *again)

    @property
    def name(self) -> str:
        if self.variant == STEPS:
            return f"{self.steps} steps"
        knobs = ((DELTA, self.delta), (THRESHOLD, self.threshold))
        kind = f"{FEWER}, {self.steps} steps" if self.variant == FEWER else self.variant
        again = [f"search {self.search + 1}"] if self.search else []
        return ", ".join([kind, *(f"{name} {x:g}" for name, x in knobs if x is not None), *again])


def points(settings: Settings) -> Iterator[Point]:
    """Give the rows in the order they are made: by search and delta, by steps, by threshold."""
    of = {
        knob: [v for v in settings.variants if VARIANTS[v].knob == knob]
        for knob in (DELTA, STEPS, THRESHOLD)
    }
    for search in range(settings.searches):
        for delta in settings.deltas:
            for variant in of[DELTA]:
                yield Point(variant, settings.steps, delta=delta, search=search)
    middle = sorted(settings.deltas)[len(settings.deltas) // 2 :][:1]
    stacked = settings.stacked_deltas or tuple(middle)
    for variant in of[STEPS]:
        bounds = stacked if variant == FEWER else (None,)
        usual = {int(settings.steps * share) for share in FEWER_STEPS} - {0}
        for bound, steps in product(
            bounds, sorted(set(settings.fewer_steps) or usual, reverse=True)
        ):
            yield Point(variant, steps, delta=bound)
    for variant in of[THRESHOLD]:
        bounds = stacked if variant == STACKED else (None,)
        for bound, threshold in product(bounds, settings.thresholds):
            yield Point(variant, settings.steps, delta=bound, threshold=threshold)
