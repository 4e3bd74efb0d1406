"""The search on tiny random pipelines: bounds hold, records are the measured ones."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline

from plans.accounting import account
from plans.bounds import Bounds, raise_offenders
from plans.errors import ArrowheadError
from plans.models import AttentionModule
from plans.plan import Bucket, Plan, check_plan, load_plan, plan_to_json, save_plan
from plans.processors import BucketHeads, install
from plans.scores import counted, relative_squared_errors
from plans.search import measure
from plans.tables import FIRST_STEPS
from plans.tiles import CACHED, FULL, TokenLayout
from tests.tiny import (
    TEXT_TOKENS,
    random_plan,
    with_modes,
)
from tests.tiny import tiny_sd3 as sd3_transformer
from tests.tiny_pipelines import STEPS, flux_pipeline, sd3_pipeline, search


@pytest.fixture(scope="module", params=["sd3", "flux", "sd3 joint", "flux joint"])
def searched(request: pytest.FixtureRequest) -> tuple[Any, Any, Plan, list]:
    name, _, method = request.param.partition(" ")
    pipe, prompts = sd3_pipeline() if name == "sd3" else flux_pipeline()
    reports: list = []
    how = {"method": method} if method else {}
    plan = search(pipe, prompts, progress=lambda *report: reports.append(report), **how)
    assert plan.search["method"] == (method or "pooled")
    return pipe, prompts, plan, reports


def test_search_makes_a_legal_plan_that_saves(searched: Any, tmp_path: Any) -> None:
    pipe, _, plan, reports = searched
    check_plan(plan)
    assert len(plan.buckets) <= 3 and plan.steps == STEPS
    assert 0 < plan.accounting["attention_flops_saved"] < 1
    assert plan.accounting == account(plan, batch=2 if plan.sampler.cfg else 1)
    assert plan.sampler.cfg == isinstance(pipe, StableDiffusion3Pipeline)
    assert plan.text_tokens == TEXT_TOKENS
    assert plan.sampler.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert [r for r in reports if r[0] == "record"][-1][1:3] == (STEPS, STEPS)
    assert reports[-1][0].startswith("measure") and reports[-1][3] > 0
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    json.dumps(plan_to_json(plan))


def test_recorded_errors_are_measured_and_within_bounds(searched: Any) -> None:
    pipe, prompts, plan, _ = searched
    errors = measure(pipe, plan, prompts)
    joint = plan.search["method"] == "joint"
    sums = [sum(own) for step in errors for own in step.values()]
    assert len(sums) == STEPS * len(plan.modules) and sum(sums) / len(sums) <= 0.3
    for module in plan.modules:
        recorded = plan.search["errors"][module.name]
        for step in range(STEPS):
            own = errors[step][module.name]
            assert not joint or sum(own) <= 0.3
            assert not joint or max(own) <= 1.5 * 0.3 / module.heads
            assert recorded[step] == pytest.approx(sum(own), rel=1e-4, abs=1e-9)
            for error, mode in zip(own, plan.modes_at(step)[module.name], strict=True):
                assert (error == 0) if mode == FULL else (error >= 0)


def test_what_was_measured_is_what_the_buckets_do(searched: Any) -> None:
    """The latents of a measuring run equal those of BucketHeads driving the same schedule."""
    pipe, prompts, plan, _ = searched
    seen: list[torch.Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    measure(pipe, plan, prompts)
    handle.remove()
    caches: dict[str, torch.Tensor] = {}
    inputs: list[dict] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda m, a, kwargs: inputs.append(kwargs), with_kwargs=True
    )
    measure(pipe, plan, prompts)
    handle.remove()
    for step, kwargs in enumerate(inputs):
        heads = BucketHeads(plan, plan.schedule[step])
        heads.cache_in = caches
        undo = install(pipe.transformer, plan.modules, heads)
        with torch.no_grad():
            out = pipe.transformer(**kwargs)[0]
        undo()
        caches |= heads.cache_out
        torch.testing.assert_close(out, seen[step], atol=2e-5, rtol=1e-4)


def test_delta_zero_is_dense() -> None:
    plan = search(*sd3_pipeline(), delta=0.0)
    assert len(plan.buckets) == 1
    assert plan.accounting["attention_flops_saved"] == 0


def test_more_delta_saves_no_less_and_candidates_are_obeyed() -> None:
    pipe, prompts = flux_pipeline()
    arrows = search(pipe, prompts, candidates=("arrow",), delta=2.0)
    caches = search(pipe, prompts, candidates=("cache",), delta=2.0)
    assert not any(CACHED in m for b in arrows.buckets for m in b.modes.values())
    assert all(max(m) < 0 for b in caches.buckets for m in b.modes.values())
    assert (
        search(pipe, prompts, delta=0.05).accounting["attention_flops_saved"]
        <= search(pipe, prompts, delta=2.0).accounting["attention_flops_saved"]
    )


def test_modules_may_cache_no_heads() -> None:
    pipe, prompts = flux_pipeline()

    def modes(plan: Plan, name: str) -> set[int]:
        return {mode for bucket in plan.buckets for mode in bucket.modes[name]}

    whole = search(pipe, prompts, delta=1.0)
    name = next(m.name for m in whole.modules if CACHED in modes(whole, m.name))
    plan = search(pipe, prompts, delta=1.0, uncached=[name])
    assert CACHED not in modes(plan, name) != {FULL}
    assert any(CACHED in modes(plan, m.name) for m in plan.modules)
    assert plan.search["uncached"] == [name]


def test_search_is_deterministic_and_leaves_the_pipeline_as_it_was() -> None:
    pipe, prompts = sd3_pipeline()
    before = dict(pipe.transformer.attn_processors)
    first, second = search(pipe, prompts), search(pipe, prompts)
    assert first.sha256 == second.sha256
    assert pipe.transformer.attn_processors == before
    assert not pipe.transformer._forward_pre_hooks and not pipe.transformer._forward_hooks


def test_raise_offenders_goes_by_the_ladder() -> None:
    plan = random_plan(sd3_transformer(), buckets=2, steps=4)
    module = plan.modules[1]
    # What the other modules save makes it dear to give the step the full bucket.
    own = {m.name: (CACHED,) * m.heads for m in plan.modules}
    plan = with_modes(plan, own | {module.name: (CACHED, 0, 1, CACHED)})
    plan = replace(plan, schedule=(0, 1, 0, 0))
    zero = {m.name: [0.0] * m.heads for m in plan.modules}
    errors = [zero, {**zero, module.name: [0.4, 0.4, 0.4, 0.01]}, zero, zero]
    candidates = {m.name: (1, 0, CACHED) for m in plan.modules}
    raised = raise_offenders(plan, errors, Bounds(0.8, 1.5), candidates)
    # Another bucket would have said how to compute head 0 where it is cached: none does.
    assert raised.buckets[1].modes[module.name] == (FULL, 1, FULL, CACHED)
    assert raise_offenders(plan, errors, Bounds(0.8, 1.5), None).buckets[1].modes[module.name] == (
        FULL, FULL, FULL, CACHED,
    )  # fmt: skip
    in_sum = [zero, {**zero, module.name: [0.2, 0.19, 0.18, 0.01]}, zero, zero]
    raised = raise_offenders(plan, in_sum, Bounds(0.4, 10), candidates)
    assert raised.buckets[1].modes[module.name] == (FULL, 0, 1, CACHED)


def _ladder_plan(schedule: tuple[int, ...], *modes: int) -> Plan:
    """All full, then buckets with one mode for every head."""
    plan = random_plan(sd3_transformer(), buckets=2, steps=len(schedule))
    buckets = [Bucket({m.name: (mode,) * m.heads for m in plan.modules}) for mode in (FULL, *modes)]
    plan = replace(plan, buckets=tuple(buckets), schedule=schedule)
    check_plan(plan)
    return plan


def _errors_at(plan: Plan, found: dict[int, list[float]]) -> list:
    """No errors but those of the first module at some steps."""
    zero = {m.name: [0.0] * m.heads for m in plan.modules}
    name = plan.modules[0].name
    return [{**zero, name: found[s]} if s in found else zero for s in range(plan.steps)]


def test_a_cached_head_becomes_what_other_buckets_make_of_it() -> None:
    plan = _ladder_plan((0, 1, 1, 2, 1, 1, 1, 1), CACHED, 0)
    name, candidates = plan.modules[0].name, {m.name: (1, 0, CACHED) for m in plan.modules}
    # The older a cache the more it errs: computed at step 5's bucket, none is old any more.
    old = _errors_at(plan, {2: [0.2, 0.0, 0.0, 0.0], 7: [0.5, 0.0, 0.0, 0.0]})
    raised = raise_offenders(plan, old, Bounds(0.4, 1.5), candidates)
    assert raised.schedule == plan.schedule
    assert raised.buckets[1].modes[name] == (0, CACHED, CACHED, CACHED)
    assert raised.buckets[2] == plan.buckets[2]


def test_what_a_raise_makes_younger_waits_for_the_next_run() -> None:
    plan = _ladder_plan((0, 1, 2, 0), CACHED, CACHED)
    modes = {**plan.buckets[2].modes, plan.modules[1].name: (FULL,) * 4}
    plan = replace(plan, buckets=(*plan.buckets[:2], Bucket(modes)))
    name, candidates = plan.modules[0].name, {m.name: (CACHED,) for m in plan.modules}
    errors = _errors_at(plan, {1: [0.5, 0.0, 0.0, 0.0], 2: [0.4, 0.0, 0.0, 0.0]})
    raised = raise_offenders(plan, errors, Bounds(0.4, 1.5), candidates)
    assert raised.buckets[1].modes[name] == (FULL, CACHED, CACHED, CACHED)
    assert raised.buckets[2].modes[name] == (CACHED,) * 4  # it reads a cache of step 1 now


def test_a_step_takes_another_bucket_where_that_costs_less() -> None:
    plan = _ladder_plan((0, *[1] * 9), CACHED)
    candidates = {m.name: (1, 0, CACHED) for m in plan.modules}
    many = _errors_at(plan, {8: [0.5, 0.5, 0.5, 0.5]})
    kept = raise_offenders(plan, many, Bounds(0.4, 1.5), candidates)
    assert kept.schedule == (0, *[1] * 7, 0, 1) and kept.buckets == plan.buckets
    # Of arrows nothing is known before or after the steps that had them.
    plan = _ladder_plan((0, 1, 2, 1, 2, 1, 1, 1, 1, 1), CACHED, 0)
    assert raise_offenders(plan, many, Bounds(0.4, 1.5), candidates).schedule == plan.schedule
    kept = raise_offenders(plan, _errors_at(plan, {3: [0.5] * 4}), Bounds(0.4, 1.5), candidates)
    assert kept.schedule == (0, 1, 2, 2, 2, 1, 1, 1, 1, 1)
    # A bucket that no step has any more leaves.
    plan = _ladder_plan((0, 2, 1, 2), CACHED, 0)
    errors = _errors_at(plan, {})
    errors[2] = {m.name: [0.5] * 4 for m in plan.modules}
    kept = raise_offenders(plan, errors, Bounds(0.4, 1.5), None)
    assert kept.schedule == (0, 1, 1, 1) and len(kept.buckets) == 2
    check_plan(kept)


def test_errors_leave_discarded_text_out() -> None:
    layout = TokenLayout(6, 2, True, 2)
    full = torch.randn(1, 8, 2, 4)
    off = full.clone()
    off[:, :2] += 9.0

    def errors(text_output: bool) -> list[float]:
        module = AttentionModule("attn", 2, 4, layout, text_output)
        return relative_squared_errors(counted(module, off), counted(module, full)).tolist()

    assert min(errors(True)) > 1
    assert errors(False) == [0.0, 0.0]
    off[0, 5, 1, 0] = torch.nan
    assert errors(False) == [0.0, torch.inf]


@pytest.mark.parametrize("method", ["joint", "progressive"])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_arrows_in_the_first_step_are_searched_and_measured(kind: str, method: str) -> None:
    pipe, prompts = sd3_pipeline() if kind == "sd3" else flux_pipeline()
    both = [
        search(pipe, prompts, delta=2.0, method=method, max_buckets=2, first_step=rule)
        for rule in FIRST_STEPS
    ]
    full, arrow = ([mode for modes in plan.modes_at(0).values() for mode in modes] for plan in both)
    assert set(full) == {FULL} and CACHED not in arrow and max(arrow) >= 0
    saved = [plan.accounting["attention_flops_saved"] for plan in both]
    assert saved[0] < saved[1]
    plan = both[1]
    assert plan.search["first_step"] == "arrow" and both[0].search["first_step"] == "full"
    errors = measure(pipe, plan, prompts)
    assert not Bounds(2.0, 1.5).broken(plan.modules, errors)
    recorded = [sum(errors[0][module.name]) for module in plan.modules]
    assert max(recorded) > 0
    assert [plan.search["errors"][module.name][0] for module in plan.modules] == pytest.approx(
        recorded, rel=1e-4, abs=1e-9
    )


def test_as_many_buckets_as_steps_are_chosen_step_by_step() -> None:
    pipe, prompts = sd3_pipeline()
    joint = search(pipe, prompts, method="joint", max_buckets=STEPS)
    both = [joint, search(pipe, prompts, method="progressive")]
    assert both[0].sha256 == both[1].sha256
    assert both[0].search["method"] == both[1].search["method"] == "progressive"
    assert both[0].search["measurements"] == 1


def test_two_calls_per_step_are_refused() -> None:
    pipe, prompts = flux_pipeline()
    negative = {f"negative_{name}": value for name, value in prompts.items()}
    with pytest.raises(ArrowheadError, match="transformer calls of FluxPipeline.*true CFG"):
        search(pipe, {**prompts, **negative, "true_cfg_scale": 4.0})


def test_schedulers_of_higher_order_are_refused() -> None:
    with pytest.raises(ArrowheadError, match="FlowMatchHeunDiscreteScheduler.*one per step"):
        search(*sd3_pipeline(FlowMatchHeunDiscreteScheduler()))


def test_other_pipelines_are_refused() -> None:
    class StableDiffusionXLPipeline:
        pass

    with pytest.raises(ArrowheadError, match="got StableDiffusionXLPipeline; expected one of"):
        search(StableDiffusionXLPipeline(), ["a cat"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(candidates=("arrow", "svd")), "candidates .* got .'svd'"),
        (dict(delta=-1.0), "error bounds .* delta -1.0"),
        (dict(candidates=("arrow",), block=128), "none: 24 image tokens are 1 blocks"),
        (dict(max_buckets=0), "number of buckets"),
        (dict(method="greedy"), "search method .* got greedy"),
        (dict(uncached=("blocks.9",)), "without cached heads .* got blocks.9; expected some of tr"),
        (dict(first_step="cached"), "first step .* got cached; expected one of full, arrow"),
        (dict(height=60), "picture size|divisible"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(*flux_pipeline(), **changes)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ArrowheadError, match="5 steps, 0 prompts"):
        search(flux_pipeline()[0], [])
