from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from plans.errors import ArrowheadError
from plans.importer import import_reference
from plans.models import ModelSpec
from plans.plan import Plan, Sampler, load_plan, save_plan
from plans.tiles import CACHED, FULL
from tests.tiny import spec_of, tiny_sd3

STEPS = 4
SAMPLER = Sampler("FlowMatchEulerDiscreteScheduler", STEPS, (1.0, 0.75, 0.5, 0.25), True, 7.0)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return spec_of(tiny_sd3(dual_attention_layers=()))  # 24 image tokens, blocks of 5, H = 4


def _tables(windows: dict[int, list[int]], prefix: str = "", layer: str = "0.attn") -> Any:
    name = f"{prefix}transformer_blocks.{layer}"
    options = {s: torch.tensor([[w, w] for w in row]).int() for s, row in windows.items()}
    shares = {s: [h for h, w in enumerate(row) if w == 0] for s, row in windows.items()}
    return {name: options}, {name: shares}


def _import(tmp_path: Path, spec: ModelSpec, options: Any, shares: Any) -> Plan:
    torch.save(options, tmp_path / "head_option.json")
    torch.save(shares, tmp_path / "outputshare_option.json")
    return import_reference(
        tmp_path / "head_option.json",
        tmp_path / "outputshare_option.json",
        spec=spec,
        sampler=SAMPLER,
    )


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_codes_are_translated_and_steps_share_buckets(
    tmp_path: Path, spec: ModelSpec, prefix: str
) -> None:
    rows = {1: [-1, 0, 3, 6], 2: [0, 0, 20, 1], 3: [-1, 0, 3, 6]}
    plan = _import(tmp_path, spec, *_tables(rows, prefix))
    first = spec.modules[0].name
    assert plan.schedule == (0, 1, 2, 1)
    assert plan.buckets[1].modes[first] == (FULL, CACHED, 1, 2)
    assert plan.buckets[2].modes[first] == (CACHED, CACHED, FULL, 1)  # 20 tokens keep everything
    assert plan.buckets[1].modes[spec.modules[1].name] == (FULL,) * 4
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_layers_may_lack_the_attentions_own_name(tmp_path: Path, spec: ModelSpec) -> None:
    plan = _import(tmp_path, spec, *_tables({1: [0, -1, -1, -1]}, layer="2"))
    assert plan.buckets[1].modes["transformer_blocks.2.attn"] == (CACHED, FULL, FULL, FULL)


def test_unknown_layer_lists_what_there_is(tmp_path: Path, spec: ModelSpec) -> None:
    with pytest.raises(ArrowheadError, match="layer transformer_blocks.9.attn .*blocks.0.attn"):
        _import(tmp_path, spec, *_tables({1: [0, -1, -1, -1]}, layer="9.attn"))


def test_one_layer_twice_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    one, other = _tables({1: [0, -1, -1, -1]}), _tables({1: [0, -1, -1, -1]}, "transformer.")
    with pytest.raises(ArrowheadError, match="transformer_blocks.0.attn twice"):
        _import(tmp_path, spec, {**one[0], **other[0]}, one[1])


def test_pickles_that_could_run_code_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    with pytest.raises(ArrowheadError, match="other pickles are not read"):
        _import(tmp_path, spec, {"layer": Payload()}, {})
    (tmp_path / "head_option.json").write_bytes(pickle.dumps({"layer": Payload()}))
    with pytest.raises(ArrowheadError, match="other pickles are not read"):
        import_reference(
            tmp_path / "head_option.json", tmp_path / "missing", spec=spec, sampler=SAMPLER
        )
    assert not ran.exists()


def test_missing_and_foreign_files_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    with pytest.raises(ArrowheadError, match="No such file.*readable file"):
        import_reference(tmp_path / "a", tmp_path / "b", spec=spec, sampler=SAMPLER)
    (tmp_path / "a").write_text("not a pickle")
    with pytest.raises(ArrowheadError, match="expected a torch.save of dictionaries"):
        import_reference(tmp_path / "a", tmp_path / "b", spec=spec, sampler=SAMPLER)
    with pytest.raises(ArrowheadError, match="got list; expected a table"):
        _import(tmp_path, spec, [1, 2], {})


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([-1, 0, 3], "3 rows of windows.*4 heads"),
        ([[3, 4], [0, 0], [3, 3], [-1, -1]], "equal left and right"),
    ],
)
def test_windows_that_do_not_fit_are_refused(
    tmp_path: Path, spec: ModelSpec, windows: Any, message: str
) -> None:
    name = spec.modules[0].name
    rows = [row if isinstance(row, list) else [row, row] for row in windows]
    with pytest.raises(ArrowheadError, match=message):
        _import(tmp_path, spec, {name: {1: torch.tensor(rows)}}, {name: {1: [1]}})


def test_files_of_two_runs_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    options, _ = _tables({1: [0, -1, 0, -1]})
    _, shares = _tables({1: [0, -1, -1, -1]})
    with pytest.raises(ArrowheadError, match=r"heads \[0\] shared.*window 0: \[0, 2\]"):
        _import(tmp_path, spec, options, shares)


def test_more_steps_than_the_sampler_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    with pytest.raises(ArrowheadError, match=r"got step 4; expected steps 0\.\.3"):
        _import(tmp_path, spec, *_tables({4: [0, -1, -1, -1]}))


def test_cached_heads_at_step_0_are_refused(tmp_path: Path, spec: ModelSpec) -> None:
    with pytest.raises(ArrowheadError, match="head 0 reads its cache"):
        _import(tmp_path, spec, *_tables({0: [0, -1, -1, -1]}))
