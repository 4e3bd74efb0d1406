"""Plans carried to other step counts and sizes: legal, by the rule, measured where asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.accounting import account
from plans.cache_flow import cache_flow
from plans.carry import carried_modes, carry_plan, nearest_steps
from plans.check import check_plan
from plans.denoising import Denoising, dense_plan_of
from plans.errors import ArrowheadError
from plans.models import model_spec
from plans.plan import Plan, dense_plan, load_plan, plan_to_json, save_plan
from plans.search import measure, measure_plan
from plans.tiles import CACHED, FULL, TokenLayout, arrow_kv_blocks
from tests import tiny
from tests.tiny_pipelines import flux_pipeline, sd3_pipeline


@cache
def model(kind: str) -> Any:
    return tiny.tiny_sd3() if kind == "sd3" else tiny.tiny_flux()


def target(plan: Plan, kind: str, steps: int, height: int, width: int, block: int) -> Plan:
    """The all-full plan at other steps, evenly spaced, and another size."""
    config = {**model(kind).config, "_class_name": plan.model.architecture}
    spec = model_spec(config, height=height, width=width, vae_scale_factor=8,
                      text_tokens=tiny.TEXT_TOKENS, block=block)  # fmt: skip
    sigmas = tuple(1 - i / steps for i in range(steps))
    sampler = replace(plan.sampler, steps=steps, sigmas=sigmas)
    return dense_plan(
        replace(
            plan,
            height=height,
            width=width,
            block=block,
            modules=spec.modules,
            sampler=sampler,
            schedule=(0,) * steps,
        )  # fmt: skip
    )


def oldest(plan: Plan, of_step: Sequence[int]) -> dict[tuple[int, str, int], dict[int, int]]:
    """By bucket, module and head: the step that reads -> age of what it reads, in `of_step`."""
    found: dict[tuple[int, str, int], dict[int, int]] = {}
    for module in plan.modules:
        for head in range(module.heads):
            for step in range(plan.steps):
                writer = step
                while plan.modes_at(writer)[module.name][head] == CACHED:
                    writer -= 1
                if writer < step:
                    key = plan.schedule[step], module.name, head
                    found.setdefault(key, {})[step] = of_step[step] - of_step[writer]
    return found


PLANS = st.builds(
    lambda kind, seed, buckets, more: (
        kind,
        tiny.random_plan(model(kind), seed, buckets, buckets + more),
    ),
    st.sampled_from(["sd3", "flux"]),
    st.integers(0, 10_000),
    st.integers(2, 5),
    st.integers(0, 9),
)


@given(PLANS, st.integers(1, 24), st.sampled_from([(64, 96), (128, 96), (32, 32), (64, 208)]),
       st.sampled_from([2, 5, 7]))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_carried_plan_is_legal_and_follows_the_rule(
    made: tuple[str, Plan], steps: int, size: tuple[int, int], block: int
) -> None:
    kind, plan = made
    to = target(plan, kind, steps, *size, block)
    carried, of_step, raised, retimed = vars(carry_plan(plan, to)).values()
    check_plan(carried)
    cache_flow(carried)
    assert carried.sampler == to.sampler and carried.modules == to.modules
    assert of_step == nearest_steps(plan, to.sampler.sigmas)
    assert all(
        abs(plan.sampler.sigmas[of] - sigma)
        == pytest.approx(min(abs(s - sigma) for s in plan.sampler.sigmas), abs=1e-6)
        for of, sigma in zip(of_step[1:], to.sampler.sigmas[1:], strict=True)
    )
    lifted = {(name, head) for _, name, head in raised}
    for step, of in enumerate(of_step):
        if step in retimed:
            continue
        for old, new in zip(plan.modules, to.modules, strict=True):
            expected = carried_modes(plan.modes_at(of)[old.name], old.layout, new.layout)
            for head, mode in enumerate(carried.modes_at(step)[new.name]):
                assert mode == expected[head] or (
                    expected[head] == CACHED and (new.name, head) in lifted and mode != CACHED
                )


@given(PLANS, st.integers(1, 24))
@settings(max_examples=150, deadline=None)
def test_caches_get_no_older_than_the_plan_let_them(made: tuple[str, Plan], steps: int) -> None:
    kind, plan = made
    to = target(plan, kind, steps, plan.height, plan.width, plan.block)
    result = carry_plan(plan, to)
    before = oldest(plan, range(plan.steps))
    for (_, name, head), ages in oldest(result.plan, result.of_step).items():
        for step, age in ages.items():
            bucket = result.retimed.get(step, plan.schedule[result.of_step[step]])
            if result.plan is plan or steps == plan.steps:
                bucket = plan.schedule[step]
            assert age <= max(before[bucket, name, head].values())


@given(PLANS, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_where_every_step_is_met_nothing_is_raised(made: tuple[str, Plan], times: int) -> None:
    """Identity at once; at twice the steps each step of the plan comes twice, and so on."""
    kind, plan = made
    to = target(plan, kind, plan.steps * times, plan.height, plan.width, plan.block)
    result = carry_plan(plan, to)
    assert not result.raised and not result.retimed
    assert result.plan.buckets == plan.buckets
    assert set(result.of_step) == set(range(plan.steps))
    if times == 1:
        assert result.plan == plan


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 2, 7, 16]),
       st.sampled_from([1, 3, 16]), st.data())  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_windows_cover_no_less_of_the_image(
    old_tokens: int, new_tokens: int, old_block: int, new_block: int, data: st.DataObject
) -> None:
    old = TokenLayout(old_tokens, 3, False, old_block)
    new = TokenLayout(new_tokens, 3, False, new_block)
    window = data.draw(st.integers(0, old.blocks - 1))
    carried = carried_modes((FULL, window, CACHED), old, new)
    assert carried[0] == FULL and carried[2] == CACHED
    mode = carried[1]
    if mode == FULL:
        return  # or as it was
    assert 0 <= mode < new.blocks
    share = [w * b / n for w, b, n in ((window, old_block, old_tokens),
                                       (mode, new_block, new_tokens))]  # fmt: skip
    assert share[1] >= share[0] - 1e-12
    middle = new.blocks // 2
    whole = len(arrow_kv_blocks(new, middle, mode)) == 2 * mode + 1
    if whole:
        band = (2 * window + 1) * old_block / old_tokens
        assert (2 * mode + 1) * new_block / new_tokens >= band - 1e-12
    assert (old_tokens, old_block) != (new_tokens, new_block) or mode == window


def test_half_windows_at_twice_the_side() -> None:
    old, new = TokenLayout(1024, 97, False, 16), TokenLayout(4096, 97, False, 16)
    # 256 blocks in place of 64: band 1 of 64 becomes 5 of 256, and so on.
    assert carried_modes((0, 1, 4, 60, 62), old, new) == (2, 6, 18, 242, 250)
    assert carried_modes((63, FULL, CACHED), old, new) == (254, FULL, CACHED)
    assert carried_modes((2, 62), new, old) == (1, 16)


@pytest.mark.parametrize("steps", [3, 5, 6])
def test_a_first_step_with_arrows_serves_only_the_steps_it_served(steps: int) -> None:
    """No graph is all full, so none can stand in anywhere: caches are computed where none fits."""
    plan = tiny.random_plan(model("sd3"), 0, 2, 8)
    buckets = tuple(
        replace(plan.buckets[0], modes={m.name: (mode,) * m.heads for m in plan.modules})
        for mode in (0, CACHED, 1)
    )
    plan = replace(plan, buckets=buckets, schedule=(0, 1, 0, 1, 2, 1, 2, 1))
    check_plan(plan)
    result = carry_plan(plan, target(plan, "sd3", steps, 64, 96, 5))
    assert result.raised or result.retimed
    # After the last step that had these arrows nothing is known of what they err.
    late = [bucket for step, bucket in result.retimed.items() if result.of_step[step] > 2]
    assert 0 not in late


def test_the_record_says_where_a_plan_comes_from() -> None:
    plan = replace(tiny.random_plan(model("sd3"), 3, 3, 8),
                   search={"delta": 0.3, "basis": "measured", "errors": {"x": [1.0]}})  # fmt: skip
    result = carry_plan(plan, target(plan, "sd3", 5, 128, 96, 5))
    record = result.plan.search
    assert record is not None and record["basis"] == "carried" and record["delta"] == 0.3
    assert "errors" not in record
    origin = record["carried_from"]
    assert origin["plan_sha256"] == plan.sha256 and origin["basis"] == "measured"
    assert (origin["steps"], origin["height"]) == (8, 64) and "nearest sigma" in origin["rule"]
    assert origin["of_step"] == list(result.of_step)
    json.dumps(plan_to_json(result.plan))
    again = carry_plan(result.plan, target(plan, "sd3", 8, 64, 96, 5)).plan
    assert again.search is not None
    assert again.search["carried_from"]["carried_from"] == origin


def test_an_old_cache_is_computed_or_its_step_takes_another_bucket() -> None:
    plan = tiny.random_plan(model("sd3"), 0, 2, 8)
    one = {m.name: (CACHED,) + (FULL,) * (m.heads - 1) for m in plan.modules}
    most = {m.name: (CACHED,) * m.heads for m in plan.modules}
    full = plan.buckets[0]
    few = replace(plan, buckets=(full, replace(full, modes=one)), schedule=(0, 1, 0, 1, 0, 1, 0, 1))
    result = carry_plan(few, target(plan, "sd3", 3, 64, 96, 5))  # ages of two and more
    assert result.raised or result.retimed
    assert set(result.plan.schedule) == {0}  # equal buckets are joined, unused ones leave
    all_ = replace(few, buckets=(full, replace(full, modes=most)))
    result = carry_plan(all_, target(plan, "sd3", 4, 64, 96, 5))
    assert account(result.plan, 1)["attention_flops_saved"] == 0  # steps 0 2 4 6: all computed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, model=replace(p.model, architecture="Other")), "transformer class"),
        (lambda p: replace(p, modules=p.modules[:-1]), "attention modules .* got 3; expected 4"),
        (lambda p: replace(p, modules=(replace(p.modules[0], heads=5), *p.modules[1:])),
         "attention modules .* 5 heads"),
        (lambda p: replace(p, sampler=replace(p.sampler, cfg=False)), "classifier-free guidance"),
        (lambda p: replace(p, sampler=replace(p.sampler, scheduler="Other")), "scheduler"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_is_refused(change: Any, message: str) -> None:
    plan = tiny.random_plan(model("sd3"))
    with pytest.raises(ArrowheadError, match=message):
        carry_plan(plan, change(dense_plan(plan)))


def test_another_config_is_refused_and_other_weights_warn() -> None:
    plan = tiny.random_plan(model("sd3"))
    other = replace(dense_plan(plan), model=replace(plan.model, config={}, config_sha256="0" * 64))
    with pytest.raises(ArrowheadError, match="transformer config"):
        carry_plan(plan, other)
    first, second = (replace(plan, model=replace(plan.model, weights_sha256=x * 64)) for x in "ab")
    with pytest.warns(UserWarning, match="measure it"):
        carried = carry_plan(first, second).plan
    assert carried.search is not None and carried.search["basis"] == "carried"


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize(("steps", "height"), [(4, 64), (9, 64), (6, 128)])
def test_a_carried_plan_runs_and_is_measured(
    kind: str, steps: int, height: int, tmp_path: Any
) -> None:
    pipe, prompts = sd3_pipeline() if kind == "sd3" else flux_pipeline()
    made = Denoising(prompts, 6, 64, 96, 4.0, None, 0)
    bare = dense_plan_of(pipe, made, 5, None, None)
    plan = tiny.random_plan(pipe.transformer)
    plan = replace(plan, model=bare.model, sampler=bare.sampler)
    to = dense_plan_of(pipe, replace(made, steps=steps, height=height), 5, None, None)
    carried = carry_plan(plan, to).plan
    result = measure_plan(pipe, carried, prompts)
    assert (result.buckets, result.schedule) == (carried.buckets, carried.schedule)
    assert result.search is not None and result.search["basis"] == "measured"
    assert result.search["carried_from"]["plan_sha256"] == plan.sha256
    live = measure(pipe, carried, prompts)
    for module in carried.modules:
        sums = [sum(row[module.name]) for row in live]
        assert result.search["errors"][module.name] == pytest.approx(sums, rel=1e-4)
    assert result.accounting == account(result, 2 if kind == "sd3" else 1)
    save_plan(result, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == result

    repaired = measure_plan(pipe, carried, prompts, repair=True, delta=0.2)
    for row in measure(pipe, repaired, prompts):
        for module in repaired.modules:
            assert sum(row[module.name]) <= 0.2 and max(row[module.name]) <= 0.3 / module.heads
    assert repaired.search is not None and repaired.search["delta"] == 0.2
    assert repaired.search["within_bounds"] is True
    broken = measure_plan(pipe, carried, prompts, delta=0.0)
    assert broken.search is not None and broken.search["within_bounds"] is False
    assert (
        account(repaired, 1)["attention_flops_saved"] < account(carried, 1)["attention_flops_saved"]
    )


def test_a_plan_is_measured_only_where_it_fits() -> None:
    pipe, prompts = sd3_pipeline()
    bare = dense_plan_of(pipe, Denoising(prompts, 6, 64, 96, 4.0, None, 0), 5, None, None)
    other = replace(bare, sampler=replace(bare.sampler, sigmas=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5)))
    with pytest.raises(ArrowheadError, match="sigmas"):
        measure_plan(pipe, other, prompts)
    with pytest.raises(ArrowheadError, match="bounds of the repair .* --delta"):
        measure_plan(pipe, bare, prompts, repair=True)
