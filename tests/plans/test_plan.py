from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.errors import ArrowheadError
from plans.json_files import dump_json
from plans.models import complete_config
from plans.plan import (
    Bucket,
    Plan,
    cache_flow,
    check_plan,
    dense_plan,
    load_plan,
    plan_from_json,
    plan_to_json,
    resolve_source,
    save_plan,
)
from plans.tiles import CACHED, FULL, TokenLayout
from tests.tiny import random_plan, spec_of, tiny_flux, tiny_sd3

SD3, FLUX = tiny_sd3(), tiny_flux()


@pytest.fixture
def plan() -> Plan:
    return random_plan(SD3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), buckets=st.integers(2, 5), flux=st.booleans())
def test_plans_survive_the_round_trip(seed: int, buckets: int, flux: bool) -> None:
    plan = random_plan(FLUX if flux else SD3, seed=seed, buckets=buckets)
    text = dump_json(plan_to_json(plan))
    assert plan_from_json(json.loads(text)) == plan
    assert dump_json(json.loads(text)) == text


def test_files_are_readable_and_keep_records(plan: Plan, tmp_path: Path) -> None:
    plan = replace(plan, search={"delta": 0.2, "errors": {"a": [0.0, 0.1]}}, accounting={"b": 1})
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text()
    modes = list(plan.buckets[0].modes["transformer_blocks.1.attn"])
    assert f'"transformer_blocks.1.attn": {modes}' in text  # one line per module and bucket
    assert f'"schedule": {list(plan.schedule)}' in text


def test_hash_covers_what_the_plan_does_only(plan: Plan) -> None:
    same = replace(
        plan, search={"delta": 1}, accounting={}, model=replace(plan.model, source="elsewhere")
    )
    assert same.sha256 == plan.sha256
    assert dense_plan(plan).sha256 != plan.sha256
    weights = replace(plan, model=replace(plan.model, weights_sha256="0" * 64))
    assert weights.sha256 != plan.sha256


def test_absolute_source_becomes_relative_to_the_file(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "models/tiny").mkdir(parents=True)
    (tmp_path / "library").mkdir()
    local = replace(plan, model=replace(plan.model, source=str(tmp_path / "models/tiny")))
    save_plan(local, tmp_path / "library/plan.json")
    loaded = load_plan(tmp_path / "library/plan.json")
    assert loaded.model.source == "../models/tiny"
    assert resolve_source(loaded, tmp_path / "library") == str(tmp_path / "models/tiny")
    hub = replace(plan, model=replace(plan.model, source="org/model"))
    assert resolve_source(hub, tmp_path) == "org/model"


def _modes(plan: Plan, bucket: int, change: Callable[[dict], Any]) -> Plan:
    modes = dict(plan.buckets[bucket].modes)
    change(modes)
    buckets = [Bucket(modes) if i == bucket else b for i, b in enumerate(plan.buckets)]
    return replace(plan, buckets=tuple(buckets))


NAME = "transformer_blocks.0.attn"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda p: _modes(p, 0, lambda m: m.update({NAME: (FULL, CACHED, FULL, FULL)})),
            "step 0.*head 1 reads its cache; expected a cache that an earlier step wrote",
        ),
        (lambda p: _modes(p, 1, lambda m: m.update({NAME: (FULL,) * 3})), "3 modes; expected 4"),
        (lambda p: _modes(p, 1, lambda m: m.update({NAME: (FULL,) * 3 + (5,)})), "got mode 5"),
        (lambda p: _modes(p, 1, lambda m: m.update({NAME: (FULL,) * 3 + (-3,)})), "got mode -3"),
        (lambda p: _modes(p, 2, lambda m: m.pop(NAME)), f"bucket 2 .*missing .'{NAME}'"),
        (lambda p: _modes(p, 2, lambda m: m.update(other=(FULL,))), "unknown .'other'"),
        (lambda p: replace(p, schedule=p.schedule[:-1] + (9,)), r"no such bucket: \[9\]"),
        (
            lambda p: replace(p, buckets=(*p.buckets, p.buckets[0])),
            r"never used: \[3\].*remove unused buckets",
        ),
        (lambda p: replace(p, schedule=p.schedule[:-1]), "5 entries, 6 sigmas.*6 steps"),
        (lambda p: replace(p, modules=p.modules + p.modules[:1]), "repeated .'transformer_blo"),
        (lambda p: replace(p, modules=()), "plan modules .* got none"),
        (lambda p: replace(p, block=7), "block 5.*expected block 7"),
    ],
)
def test_illegal_plans_are_refused(
    plan: Plan, break_it: Callable[[Plan], Plan], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArrowheadError, match=message):
        check_plan(break_it(plan))
    with pytest.raises(ArrowheadError, match=message):
        save_plan(break_it(plan), tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def _edited(plan: Plan, *path: Any, to: Any = None, drop: bool = False) -> dict:
    data = json.loads(json.dumps(plan_to_json(plan)))
    place = data
    for key in path[:-1]:
        place = place[key]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return data


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("format",), "arrowhead.plan/9", "format .*got arrowhead.plan/9; expected arrowhead.pl"),
        (("block",), 0, "plan, block .*less than the minimum"),
        (("modules", 1, "heads"), "4", "plan, modules/1/heads .*not of type 'integer'"),
        (("buckets", 1, NAME, 0), -7, "less than the minimum"),
        (("colour",), "red", "'colour' was unexpected"),
        (("sampler", "sigmas", 2), 0.123, "sampler.sigmas .*sigmas_sha256"),
    ],
)
def test_broken_files_are_refused(plan: Plan, path: Any, to: Any, message: str) -> None:
    with pytest.raises(ArrowheadError, match=message):
        plan_from_json(_edited(plan, *path, to=to))


def test_missing_entries_and_files_are_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ArrowheadError, match="'schedule' is a required property"):
        plan_from_json(_edited(plan, "schedule", drop=True))
    with pytest.raises(ArrowheadError, match="No such file"):
        load_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ArrowheadError, match="malformed JSON.*arrowhead plan import"):
        load_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ArrowheadError, match="malformed JSON"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(ArrowheadError, match="format .*got None"):
        plan_from_json({})


def test_fitting_model_and_sampler_pass(plan: Plan) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_plan(plan, spec_of(SD3), plan.sampler)
        check_plan(plan, spec_of(SD3, block=4))  # the block is the plan's own choice


def test_other_models_are_refused_with_what_differs(plan: Plan) -> None:
    spec = spec_of(SD3)
    cases = [
        (spec_of(FLUX), "transformer class .*got FluxTransformer2DModel.*SD3Transformer2DModel"),
        (replace(spec, height=128), "picture size .*got 128x96; expected 64x96, as planned"),
        (replace(spec, text_tokens=77), "text tokens .*got 77; expected 5.*max_sequence_length"),
        (spec_of(tiny_sd3(num_layers=4)), "transformer config .*got another config"),
        (replace(spec, modules=spec.modules[:-1]), "attention modules .*got 3; expected 4"),
    ]
    for other, message in cases:
        with pytest.raises(ArrowheadError, match=message):
            check_plan(plan, other)
    layout = replace(spec.modules[0].layout, text_first=True)
    modules = (replace(spec.modules[0], layout=layout), *spec.modules[1:])
    with pytest.raises(ArrowheadError, match="text first.*image first"):
        check_plan(plan, replace(spec, modules=modules))


def test_kept_config_names_the_keys_that_differ(plan: Plan) -> None:
    config = complete_config({**SD3.config, "_class_name": "SD3Transformer2DModel"})
    plan = replace(plan, model=replace(plan.model, config=config))
    check_plan(plan, spec_of(SD3))
    with pytest.raises(ArrowheadError, match="got {'num_layers': 4}; expected {'num_layers': 3}"):
        check_plan(plan, spec_of(tiny_sd3(num_layers=4)))


def test_other_samplers_are_refused(plan: Plan) -> None:
    sampler = plan.sampler
    shifted = tuple(s * 0.9 for s in sampler.sigmas)
    longer = replace(sampler, steps=7, sigmas=(*sampler.sigmas, 0.01))
    cases = [
        (longer, "denoising steps .*got 7; expected 6.*num_inference_steps=6"),
        (replace(sampler, sigmas=shifted), "sigmas .*got 0.900000 at step 0; expected 1.000000"),
        (replace(sampler, cfg=False), "guidance .*got off; expected on.*guidance_scale=4.0"),
    ]
    for other, message in cases:
        with pytest.raises(ArrowheadError, match=message):
            check_plan(plan, sampler=other)
    noise = tuple(s + 1e-7 for s in sampler.sigmas)
    check_plan(plan, sampler=replace(sampler, sigmas=noise))


@pytest.mark.parametrize(
    "change", [{"guidance_scale": 7.0}, {"scheduler": "FlowMatchLCMScheduler"}]
)
def test_other_guidance_or_scheduler_class_warns(plan: Plan, change: dict) -> None:
    with pytest.warns(UserWarning, match=f"{next(iter(change))} .* differs from the"):
        check_plan(plan, sampler=replace(plan.sampler, **change))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), buckets=st.integers(2, 5))
def test_cache_flow_serves_every_read_and_only_reads(seed: int, buckets: int) -> None:
    """Replay the schedule head by head: what a step reads is what was last computed."""
    plan = random_plan(SD3, seed=seed, buckets=buckets, steps=9)
    flow = cache_flow(plan)
    for module in plan.modules:
        group_of = {head: g for g in flow.of(module.name) for head in g.heads}
        assert sum(len(g.heads) for g in flow.of(module.name)) == len(group_of)
        for head in range(module.heads):
            stored = computed = None
            needed: set[int] = set()
            for step, bucket in enumerate(plan.schedule):
                if plan.modes_at(step)[module.name][head] == CACHED:
                    assert bucket in group_of[head].readers
                    assert bucket not in group_of[head].writers
                    assert stored is not None and stored == computed
                    needed.add(plan.schedule[computed])
                else:
                    computed = step
                    if head in group_of and bucket in group_of[head].writers:
                        stored = step
            if head in group_of:
                assert group_of[head].writers == needed
    assert flow.groups == tuple(g for m in plan.modules for g in flow.of(m.name))
    for bucket in range(len(plan.buckets)):
        assert not set(flow.reads(bucket)) & set(flow.writes(bucket))


def test_cache_groups_are_named_and_split_by_use(plan: Plan) -> None:
    full = {m.name: (FULL,) * m.heads for m in plan.modules}
    buckets = (
        Bucket(full),
        Bucket({**full, NAME: (CACHED, CACHED, FULL, FULL)}),
        Bucket({**full, NAME: (CACHED, FULL, CACHED, FULL)}),
    )
    plan = replace(plan, buckets=buckets, schedule=(0, 1, 2, 1, 0, 0))
    groups = cache_flow(plan).groups
    assert [g.name for g in groups] == [f"{NAME}.{i}" for i in range(3)]
    assert [g.heads for g in groups] == [(0,), (1,), (2,)]
    assert [set(g.readers) for g in groups] == [{1, 2}, {1}, {2}]
    assert [set(g.writers) for g in groups] == [{0}, {0, 2}, {1}]
    assert not cache_flow(dense_plan(plan)).groups


def test_dense_plan_is_one_full_bucket(plan: Plan) -> None:
    dense = dense_plan(plan)
    check_plan(dense, spec_of(SD3), plan.sampler)
    assert len(dense.buckets) == 1 and dense.steps == plan.steps
    assert {m for row in dense.modes_at(0).values() for m in row} == {FULL}


def test_the_first_step_may_have_arrows_but_no_caches(plan: Plan) -> None:
    arrows = _modes(plan, 0, lambda m: m.update({NAME: (0, 1, FULL, 2)}))
    check_plan(arrows, spec_of(SD3), plan.sampler)
    assert plan_from_json(json.loads(dump_json(plan_to_json(arrows)))) == arrows
    assert plan.full_bucket == 0 and arrows.full_bucket is None
    with pytest.raises(ArrowheadError, match="step 0.*reads its cache.*without cached heads"):
        check_plan(replace(arrows, schedule=(2, 0, 1, 0, 1, 0)))
    full_later = replace(arrows, buckets=(*arrows.buckets[:2], plan.buckets[0]))
    assert full_later.full_bucket == 2 and dense_plan(arrows).full_bucket == 0


def test_text_layouts_differ_per_module_only_by_having_none(plan: Plan) -> None:
    dual = plan.modules[1]
    assert dual.layout.text_tokens == 0
    wrong = replace(dual, layout=TokenLayout(24, 3, False, 5))
    with pytest.raises(ArrowheadError, match="text_tokens 3; expected .*text_tokens 5 or 0"):
        check_plan(replace(plan, modules=(plan.modules[0], wrong, *plan.modules[2:])))
