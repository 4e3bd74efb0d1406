"""Edits given on a command line, and differences in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plans.errors import ArrowheadError
from plans.plan import Plan
from tests import tiny
from trt_runtime.plan_text import (
    Edit,
    apply_edits,
    differences,
    mode_name,
    modes_text,
    own_buckets,
    parse_edit,
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return tiny.random_plan(tiny.tiny_sd3())


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("a.b.attn:0,2-3=cached", Edit("a.b.attn", (0, 2, 3), -2)),
        ("*:all=full", Edit("*", None, -1)),
        ("x:1=4", Edit("x", (1,), 4)),
    ],
)
def test_edits_are_read(text: str, edit: Edit) -> None:
    assert parse_edit(text) == edit


@pytest.mark.parametrize("text", ["x:1=-2", "x=full", "x:1", "x:a=full", "x:1=half", ":1=full"])
def test_malformed_edits_are_refused(text: str) -> None:
    with pytest.raises(ArrowheadError, match="--set .* MODULE:HEADS=MODE"):
        parse_edit(text)


def test_edits_change_one_bucket(plan: Plan) -> None:
    name = plan.modules[0].name
    edited = apply_edits(plan, 1, [Edit(name, (0, 3), 2), Edit("*.1.attn", None, -1)])
    assert edited.buckets[1].modes[name] == (2, -2, -2, 2)
    assert edited.buckets[1].modes["transformer_blocks.1.attn"] == (-1,) * 4
    assert edited.buckets[2] == plan.buckets[2]


@pytest.mark.parametrize(
    ("bucket", "edit", "message"),
    [
        (9, Edit("*", None, -1), r"--bucket .* got 9; expected one of 0\.\.2"),
        (1, Edit("nothing.*", None, -1), "--set module .* transformer_blocks.0.attn"),
        (1, Edit("*.1.attn", (4,), -1), r"--set heads of .* got 4; expected 0\.\.3"),
    ],
)
def test_edits_that_miss_are_refused(plan: Plan, bucket: int, edit: Edit, message: str) -> None:
    with pytest.raises(ArrowheadError, match=message):
        apply_edits(plan, bucket, [edit])


def test_differences_in_words(plan: Plan) -> None:
    assert differences(plan, plan) == []
    name = plan.modules[0].name
    edited = apply_edits(plan, 1, [Edit(name, (0,), -1)])
    steps = " ".join(str(step) for step, bucket in enumerate(plan.schedule) if bucket == 1)
    assert f"steps {steps}, {name}: head 0 cached -> full" in differences(plan, edited)
    doubled = replace(
        edited,
        sampler=replace(plan.sampler, steps=12, sigmas=tuple(1 - i / 12 for i in range(12))),
        schedule=tuple(plan.schedule[i // 2] for i in range(12)),
    )
    found = differences(plan, doubled)
    assert "steps: 6 -> 12" in found
    # Step 3, halfway between 1 and 2, is compared with the earlier.
    assert any(line.startswith("steps 1->2 1->3 ") for line in found)
    other = replace(plan, height=128, schedule=(0, 1, 2, 0, 0, 0))
    found = differences(plan, other)
    assert "height: 64 -> 128" in found
    assert any(line.startswith("schedule: 0 1 2") for line in found)
    fewer = replace(plan, modules=plan.modules[1:])
    assert f"{name}: only in the first" in differences(plan, fewer)
    assert f"{name}: only in the second" in differences(fewer, plan)


def test_mode_names() -> None:
    assert [mode_name(m) for m in (-2, -1, 3)] == ["cached", "full", "arrow 3"]
    assert [mode_name(m, short=True) for m in (-2, -1, 3)] == ["C", "F", "3"]


def test_modes_are_told_one_by_one_or_by_count() -> None:
    assert modes_text((-1, -2, 3, 3, 12, -2)) == "F C 3 3 12 C"
    assert modes_text((-1, -2, 3, 3, 12, -2), counted=True) == "1F 2x3 1x12 2C"


def test_steps_that_are_all_of_a_bucket_keep_it(plan: Plan) -> None:
    steps = [step for step, bucket in enumerate(plan.schedule) if bucket == 1]
    assert own_buckets(plan, steps) == (plan, [1])
    split, buckets = own_buckets(plan, [0])
    assert split.buckets[buckets[0]] == plan.buckets[0]
