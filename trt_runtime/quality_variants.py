"""What each kind of row of `bench quality` installs in the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from plans.accounting import account
from plans.cache_flow import every_write
from plans.denoising import Denoising
from plans.layerwise import search_layerwise
from plans.plan import Bucket, Plan, load_plan, save_plan
from plans.run import run_plan
from plans.search import DIVISORS, search_plan
from trt_runtime.parity import Progress
from trt_runtime.quality_peers import FIRST_BLOCK, dbcache, first_block_cache
from trt_runtime.quality_settings import FEWER, OURS, PRICED, STACKED, Point, Settings


@dataclass(frozen=True)
class Run:
    """What a row runs: a plan, if it follows one, and what is installed while it draws.

    share: rows of equal share draw equal pictures.
    """

    plan: Plan | None
    installed: Callable[[], AbstractContextManager[Any]]
    share: str | None = None
    facts: Mapping[str, Any] | None = None


class Planner:
    """Makes plans for the rows, each once, and keeps them in `folder`/plans.

    resumed: take those that lie there, which the same settings made. modules: names of the
    transformer's attention modules.
    """

    def __init__(
        self, pipe: Any, settings: Settings, folder: Path, progress: Progress, *, resumed: bool,
        modules: Sequence[str],
    ) -> None:  # fmt: skip
        self.pipe, self.settings = pipe, settings
        self._first_block = [name for name in modules if name.startswith(FIRST_BLOCK)]
        self._folder, self._progress = folder / "plans", progress
        self._known = {path.name for path in self._folder.glob("*.json")} if resumed else set()

    def plan(self, variant: str, delta: float, search: int = 0, **other: Any) -> tuple[Plan, str]:
        """Give the plan of a variant at a bound, and its file, relative to the folder.

        search: which of them, each with its own noise. other: steps, another count than the
        settings'; threshold of the step cache that it is for.
        """
        named = "".join(f"-{name}-{value:g}" for name, value in other.items())
        again = f"-search-{search + 1}" if search else ""
        path = self._folder / f"{variant}{named}-{delta:g}{again}.json"
        if path.name not in self._known:
            self._folder.mkdir(exist_ok=True)
            save_plan(_SEARCHES[variant](self, delta, search, **other), path)
            self._known.add(path.name)
        return load_plan(path), f"{self._folder.name}/{path.name}"

    def search(self, delta: float, search: int, **how: Any) -> Plan:
        """Search with plans.search."""
        settings = self.settings
        how = {"steps": settings.steps} | how
        return search_plan(
            self.pipe, settings.calibration, height=settings.height,
            width=settings.width, delta=delta, block=settings.block,
            max_buckets=settings.max_buckets, guidance_scale=settings.guidance_scale,
            max_sequence_length=settings.max_sequence_length, seed=settings.search_seed(search),
            source=settings.source, revision=settings.revision,
            progress=lambda stage, at, of, _: self._progress(f"search, {stage}", at, of), **how,
        )  # fmt: skip

    def priced(self, delta: float, search: int, **how: Any) -> Plan:
        """Search for milliseconds, where there are prices."""
        return self.search(delta, search, prices=self.settings.prices, **how)

    def under_cache(self, delta: float, search: int, threshold: float) -> Plan:
        """Search with FirstBlockCache around the transformer, whose first block caches no heads.

        By what that block changes from step to step it decides: were its heads repeated, a plan
        could make it skip steps, where nothing is left that could be seen to err.
        """
        with first_block_cache(self.pipe, threshold):
            return self.priced(delta, search, uncached=self._first_block)

    def layerwise(self, delta: float, search: int) -> Plan:
        """Search with one mode per module and step."""
        s = self.settings
        run = Denoising(
            s.calibration, s.steps, s.height, s.width, s.guidance_scale, s.max_sequence_length,
            s.search_seed(search),
        )  # fmt: skip
        return search_layerwise(
            self.pipe, run, delta=delta, block=s.block, source=s.source, revision=s.revision
        )

    def shuffled(self, delta: float, search: int) -> Plan:
        """Shuffle the modes of our plan at this bound over the heads of each bucket."""
        seed = [self.settings.seed + search, round(1e6 * delta)]
        return shuffle_modes(self.plan(OURS, delta, search=search)[0], seed)


def shuffle_modes(plan: Plan, seed: Sequence[int]) -> Plan:
    """Shuffle the modes of each bucket over all heads of all modules; the schedule stays.

    Step 0's bucket has no cached head and gets none: every cache is written before it is read.
    """
    rng = np.random.default_rng(list(seed))
    ends = np.cumsum([module.heads for module in plan.modules])
    buckets = []
    for bucket in plan.buckets:
        row = rng.permutation([mode for m in plan.modules for mode in bucket.modes[m.name]])
        modes = {
            m.name: tuple(int(mode) for mode in row[end - m.heads : end])
            for m, end in zip(plan.modules, ends, strict=True)
        }
        buckets.append(Bucket(modes))
    shuffled = replace(plan, buckets=tuple(buckets), search={"method": "shuffled", "seed": [*seed]})
    return replace(shuffled, accounting=account(shuffled, batch=2 if plan.sampler.cfg else 1))


_SEARCHES: dict[str, Callable[..., Plan]] = {
    OURS: Planner.search,
    PRICED: Planner.priced,
    "arrow": partial(Planner.search, candidates=("arrow",)),
    "cache": partial(Planner.search, candidates=("cache",)),
    "wide": partial(Planner.search, divisors=(2, 4, *DIVISORS)),
    "output": partial(Planner.search, error_weights="output"),
    "stream": partial(Planner.search, error_weights="stream"),
    "stream-dt": partial(Planner.search, error_weights="stream-dt"),
    "gradient": partial(Planner.search, error_weights="gradient"),
    "joint": partial(Planner.search, method="joint"),
    "paper": partial(Planner.search, method="progressive"),
    "layer": Planner.layerwise,
    STACKED: Planner.under_cache,
    "random": Planner.shuffled,
}


def run_of(planner: Planner, point: Point) -> Run:
    """Give what a row runs; searches its plan if it has one."""
    return _RUNS.get(point.variant, _follow)(planner, point)


def _follow(planner: Planner, point: Point, search: str | None = None) -> Run:
    plan, facts = _plan_of(planner, search or point.variant, point)
    return Run(plan, partial(run_plan, planner.pipe, plan), plan.sha256, facts)


def _fewer_steps(planner: Planner, point: Point) -> Run:
    return Run(None, nullcontext)


def _peer(
    cache: Callable[[Any, float], AbstractContextManager[None]], planner: Planner, point: Point
) -> Run:
    assert point.threshold is not None
    return Run(None, partial(cache, planner.pipe, point.threshold))


def _stacked(planner: Planner, point: Point) -> Run:
    threshold = point.threshold
    assert threshold is not None
    plan, facts = _plan_of(planner, STACKED, point, threshold=threshold)

    @contextmanager
    def installed() -> Iterator[None]:
        with (
            run_plan(planner.pipe, plan, every_write(plan)),
            first_block_cache(planner.pipe, threshold),
        ):
            yield

    return Run(plan, installed, None, facts)


def _plan_of(
    planner: Planner, variant: str, point: Point, **other: Any
) -> tuple[Plan, dict[str, Any]]:
    assert point.delta is not None
    if point.steps != planner.settings.steps:
        other |= {"steps": point.steps}
    plan, file = planner.plan(variant, point.delta, point.search, **other)
    return plan, {
        "buckets": len(plan.buckets),
        "plan": file,
        "plan_sha256": plan.sha256,
        "paper_formula_saved": (plan.accounting or {})["paper_formula_saved"],
        "search_seconds": (plan.search or {}).get("seconds"),
    }


_RUNS: dict[str, Callable[[Planner, Point], Run]] = {
    "steps": _fewer_steps,
    FEWER: partial(_follow, search=PRICED),
    "first-block-cache": partial(_peer, first_block_cache),
    "dbcache": partial(_peer, dbcache),
    STACKED: _stacked,
}
