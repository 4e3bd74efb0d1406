"""How much is run by the size of the model, and the memory that takes."""

from __future__ import annotations

import pytest

from plans.effort import Wanted, effort_for, memory_text, refuse_beyond, search_memory
from plans.errors import ArrowheadError
from plans.models import AttentionModule
from plans.tiles import CACHED, TokenLayout

FLUX_2K = TokenLayout(16384, 512, True)


def _flux(modules: int) -> list[AttentionModule]:
    return [AttentionModule(f"m{i}", 24, 128, FLUX_2K, True) for i in range(modules)]


@pytest.mark.parametrize(("prompts", "rounds"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 8)])
def test_large_models_run_prompts_one_by_one_within_the_budget(prompts: int, rounds: int) -> None:
    effort = effort_for(6e14 * 50, prompts)
    assert (effort.pictures_per_run, effort.final_check, effort.rounds) == (1, False, rounds)
    assert prompts < 2 or 1.12 + 0.25 + (0.98 + 0.07) * rounds <= 1.35 * prompts
    assert prompts == 1 or 1 + rounds >= prompts  # each is seen


def test_small_models_run_all_together_until_it_holds_and_wishes_count() -> None:
    effort = effort_for(2e12, 5)
    assert (effort.rounds, effort.pictures_per_run, effort.final_check) == (6, 5, True)
    wished = effort_for(2e12, 5, Wanted(2, 1, False, 512))
    assert (wished.rounds, wished.pictures_per_run) == (2, 1)
    assert (wished.final_check, wished.sample_tokens) == (False, 512)
    with pytest.raises(ArrowheadError, match="effort of the search .* 0 prompts in a run"):
        effort_for(2e12, 5, Wanted(pictures_per_run=0))


def test_memory_is_counted_by_hand() -> None:
    modules = _flux(57)
    candidates = {m.name: (8, 4, 2, CACHED) for m in modules}
    needed = search_memory(modules, candidates, rows=1, item=2, ages=10)
    assert needed["samples"] == 57 * 10 * (2048 + 512) * 3072 * 2
    assert needed["outputs"] == 57 * 16896 * 3072 * 2
    fewer = search_memory(modules, candidates, rows=1, item=2, ages=10, sample_tokens=512)
    assert fewer["samples"] == 57 * 10 * (512 + 512) * 3072 * 2
    arrows = search_memory(modules, {m.name: (8, 4, 2) for m in modules}, 1, 2, 10)
    assert arrows["outputs"] == 0 and arrows["samples"] == 0
    total = sum(needed.values())
    assert f"{total / 2**30:.2f} GiB" in memory_text(needed)
    refuse_beyond(needed, total)
    with pytest.raises(ArrowheadError, match="--sample-tokens.*--offload"):
        refuse_beyond(needed, total - 1)
