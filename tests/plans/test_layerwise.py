"""Plans whose heads share one mode a module, and caches that are written at every chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from plans.cache_flow import cache_flow, every_write
from plans.layerwise import ChooseModules
from plans.recorder import head_savings
from plans.tiles import CACHED, FULL
from tests import tiny


@pytest.mark.parametrize(
    ("delta", "expected"), [(0.3, FULL), (0.4, 2), (0.9, 2), (1.0, 1), (9.0, CACHED)]
)
def test_a_module_takes_what_saves_most_within_its_sum(delta: float, expected: int) -> None:
    """Four heads that err 0.1 each with window 2, 0.25 with window 1, 1 with a cache."""
    module = tiny.spec_of(tiny.tiny_flux()).modules[0]
    modes = (2, 1, CACHED)
    savings = {module.name: head_savings(module, modes)}
    strategy = ChooseModules((module,), {module.name: modes}, savings, delta, 1.0)
    scores: list[dict[int, float]] = [{2: 0.1, 1: 0.25, CACHED: 1.0}] * module.heads
    chosen: Sequence[int] = strategy._choose(module, scores)
    assert list(chosen) == [expected] * module.heads


@pytest.mark.parametrize("make", [tiny.tiny_sd3, tiny.tiny_flux])
def test_every_write_adds_writers_and_nothing_else(make: Any) -> None:
    plan = tiny.random_plan(make())
    more = 0
    for group, usual in zip(every_write(plan).groups, cache_flow(plan).groups, strict=True):
        assert (group.name, group.heads, group.readers) == (usual.name, usual.heads, usual.readers)
        assert usual.writers <= group.writers
        assert group.writers == frozenset(range(len(plan.buckets))) - group.readers
        more += len(group.writers - usual.writers)
    assert more > 0
