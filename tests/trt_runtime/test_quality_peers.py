"""Step caches on a pipeline: what they skip, that they leave no trace, and under a plan."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plans.cache_flow import every_write
from plans.denoising import Denoising, dense_plan_of
from plans.plan import Bucket
from plans.run import run_plan
from plans.search import search_plan
from tests.trt_runtime.test_quality import Bundles, base_settings
from trt_runtime.pipeline import load_source_pipeline
from trt_runtime.quality_draw import Artist, Drawn, work_saved
from trt_runtime.quality_peers import FIRST_BLOCK, dbcache, first_block_cache, missing_peers

STEPS, MODULES = 4, {"sd3": 4, "flux": 3}  # SD3's first block has two attention modules


@pytest.fixture(params=["sd3", "flux"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(kind: str, torch_bundle: Bundles, prompts_without_encoders: None) -> Any:
    folder: Path = torch_bundle(kind)[0]
    pipe = load_source_pipeline(str(folder.parent / "model"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bare(pipe: Any) -> Any:
    s = base_settings()
    run = Denoising(s.captions[:1], STEPS, s.height, s.width, s.guidance_scale, None, 0)
    return dense_plan_of(pipe, run, s.block, None, None)


def draw(pipe: Any, installed: Any) -> Drawn:
    """Draw five pictures in calls of two."""
    names = [module.name for module in bare(pipe).modules]
    with installed:
        return Artist(pipe, base_settings(), names).draw(STEPS)


def called(drawn: Drawn) -> list[list[int]]:
    return [[len(names) for names in call] for call in drawn.ran]


needs_dbcache = pytest.mark.skipif(bool(missing_peers()), reason=str(missing_peers()))
PEERS = [first_block_cache, pytest.param(dbcache, marks=needs_dbcache)]
# Blocks that each computes at a step it skips: the first, or the first and the last.
SKIPPED = [(first_block_cache, 0), pytest.param(dbcache, 1, marks=needs_dbcache)]


def test_a_peer_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)  # as if it were not installed
    assert "not installed: pip install 'arrowhead[peers]'" in missing_peers()["dbcache"]
    monkeypatch.delitem(sys.modules, "cache_dit")
    (tmp_path / "cache_dit.py").write_text("raise OSError('libcuda.so.1')")
    monkeypatch.syspath_prepend(tmp_path)
    assert missing_peers() == {"dbcache": "cache-dit does not load: libcuda.so.1"}


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_that_never_skips_changes_nothing(peer: Any, pipe: Any, kind: str) -> None:
    dense = draw(pipe, nullcontext())
    assert called(dense) == [[MODULES[kind]] * STEPS] * 3
    cached = draw(pipe, peer(pipe, 1e-9))
    assert called(cached) == called(dense)
    torch.testing.assert_close(cached.latents, dense.latents)
    assert work_saved(bare(pipe), cached.ran) == pytest.approx(
        {"attention_flops_saved": 0, "transformer_flops_saved": 0}
    )


@pytest.mark.parametrize(("peer", "after"), SKIPPED)
def test_a_peer_that_always_skips(peer: Any, after: int, pipe: Any, kind: str) -> None:
    """Each call starts anew; where a step is skipped, the outer blocks alone are run."""
    dense = draw(pipe, nullcontext())
    cached = draw(pipe, peer(pipe, 1e9))
    run = MODULES[kind] - 2 + after
    assert called(cached) == [[MODULES[kind], *[run] * (STEPS - 1)]] * 3
    saved = work_saved(bare(pipe), cached.ran)
    share = (1 - run / MODULES[kind]) * (STEPS - 1) / STEPS
    assert saved["transformer_flops_saved"] == pytest.approx(share)
    assert 0.8 * share < saved["attention_flops_saved"] < 1.25 * share
    assert (cached.latents[:, -1] - dense.latents[:, -1]).norm() > 0.01
    torch.testing.assert_close(cached.latents[:, 0], dense.latents[:, 0])
    again = draw(pipe, nullcontext())
    torch.testing.assert_close(again.latents, dense.latents, rtol=0, atol=0)


def test_a_plan_runs_under_a_step_cache(pipe: Any) -> None:
    """A cache that is due to be written at a skipped step is read as it was written before."""
    plan = bare(pipe)
    arrow, cached = (Bucket({m.name: (mode,) * m.heads for m in plan.modules}) for mode in (1, -2))
    plan = replace(plan, buckets=(*plan.buckets, arrow, cached), schedule=(0, 1, 1, 2))
    with run_plan(pipe, plan, every_write(plan)) as heads:
        alone = draw(pipe, nullcontext())
        assert heads.caches
    torch.testing.assert_close(alone.latents, draw(pipe, run_plan(pipe, plan)).latents)
    with run_plan(pipe, plan, every_write(plan)):
        both = draw(pipe, first_block_cache(pipe, 1e9))
    assert both.latents.isfinite().all()
    saved = work_saved(plan, both.ran)
    for name, share in work_saved(plan, alone.ran).items():
        assert 0 < share < saved[name]


def test_a_plan_is_searched_under_a_step_cache(pipe: Any, kind: str) -> None:
    """Where the cache skips all steps but the first, nothing errs and the first bucket is all."""
    s = base_settings()
    how: dict[str, Any] = dict(
        steps=STEPS,
        height=s.height,
        width=s.width,
        delta=0.5,
        block=s.block,
        max_buckets=STEPS,
        guidance_scale=s.guidance_scale,
    )
    first = [m.name for m in bare(pipe).modules if m.name.startswith(FIRST_BLOCK)]
    assert len(first) == (2 if kind == "sd3" else 1)
    with first_block_cache(pipe, 1e9):
        plan = search_plan(pipe, s.captions[:1], uncached=first, **how)
    assert plan.schedule == (0,) * STEPS and plan.search is not None
    assert not any(sum(sums) for sums in plan.search["errors"].values())
    with first_block_cache(pipe, 1e-9):
        every = search_plan(pipe, s.captions[:1], uncached=first, **how)
    assert every.buckets == search_plan(pipe, s.captions[:1], uncached=first, **how).buckets
    assert len(every.buckets) > 1
