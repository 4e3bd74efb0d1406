"""Heads moved in a transformer's own weights, and put back bit for bit whatever happens."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plans import prepared, reordered
from plans.errors import ArrowheadError
from plans.plan import Bucket, Plan
from plans.prepared import PreparedPlan
from plans.reordered import orders_of
from tests import tiny
from tests.plans.test_prepared import MODELS, by_processors


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def scattered(model: Any) -> Plan:
    """A plan whose bucket 1 computes heads 0 and 2 of every module."""
    plan = tiny.random_plan(model)
    return tiny.with_modes(plan, {module.name: (-1, -2, 0, -2) for module in plan.modules})


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}


def sample_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny.inputs_of(model), return_dict=False)[0]


def test_moved_heads_compute_the_same_and_come_back(kind: str) -> None:
    model = MODELS[kind]()
    for parameter in model.parameters():
        assert parameter.requires_grad  # as diffusers loads them
    before, sample = copies(model), sample_of(model)
    places = {name: w.data_ptr() for name, w in model.state_dict().items()}
    plan = scattered(model)
    held = PreparedPlan(model, plan, batch=2)
    moved = changed(model, before)
    assert {name.rpartition(".")[2] for name in moved} == {"weight", "bias"}
    assert set(orders_of(model)) == {module.name for module in plan.modules}
    torch.testing.assert_close(sample_of(model), sample, atol=2e-6, rtol=1e-5)
    held.drop()
    held.drop()
    assert not changed(model, before) and not orders_of(model)
    assert places == {name: w.data_ptr() for name, w in model.state_dict().items()}
    assert torch.equal(sample_of(model), sample)


def test_three_buckets_copy_no_weights(kind: str) -> None:
    model = MODELS[kind]()
    for seed in range(4):
        held = PreparedPlan(model, tiny.random_plan(model, seed), batch=2)
        assert held.weight_bytes() == 0
        own = {w.untyped_storage().data_ptr() for w in model.parameters()}
        for _, piece in held._pieces._taken.values():
            assert piece.weight.untyped_storage().data_ptr() in own
        held.drop()


def test_without_moving_heads_weights_stay_and_buckets_copy(kind: str) -> None:
    model = MODELS[kind]()
    plan, before = scattered(model), copies(model)
    expected = by_processors_of(model, plan)
    held = PreparedPlan(model, plan, batch=2, move_heads=False)
    assert not changed(model, before) and not orders_of(model) and held.weight_bytes() > 0
    assert_steps(model, plan, held, expected)


def test_what_is_no_run_is_copied_and_counted() -> None:
    model = tiny.tiny_flux(num_attention_heads=6)
    spec = tiny.spec_of(model)
    name = spec.modules[-1].name
    sets = [{0, 1, 3}, {0, 2, 4}, {1, 2, 5}]  # heads 0, 1, 2 are between two of them each: a ring
    full = {module.name: (-1,) * 6 for module in spec.modules}
    rows = [tuple(-1 if head in own else -2 for head in range(6)) for own in sets]
    buckets = (Bucket(full), *(Bucket({**full, name: row}) for row in rows))
    plan = replace(
        tiny.random_plan(tiny.tiny_flux()), modules=spec.modules, buckets=buckets,
        schedule=(0, 1, 2, 3, 0, 1),
    )  # fmt: skip
    expected = by_processors_of(model, plan)
    held = PreparedPlan(model, plan, batch=2)
    width, computed = 48, 3 * 8
    piece = 4 * (3 * (computed * width + computed) + width * computed)  # fp32: Q, K, V, output
    assert held.weight_bytes() == piece  # of one set in three
    assert_steps(model, plan, held, expected)


def by_processors_of(model: Any, plan: Any) -> list[Tensor]:
    with torch.no_grad():
        return by_processors(model, plan)


def assert_steps(model: Any, plan: Any, held: PreparedPlan, expected: list[Tensor]) -> None:
    held.reset(float("nan"))
    for step, bucket in enumerate(plan.schedule):
        with torch.no_grad(), held.buckets[bucket].installed():
            sample = model(**tiny.inputs_of(model, step), return_dict=False)[0]
        torch.testing.assert_close(sample, expected[step], atol=2e-6, rtol=1e-5)


def test_a_second_plan_takes_the_order_it_finds_and_the_last_puts_it_back(kind: str) -> None:
    model = MODELS[kind]()
    before = copies(model)
    plans = [tiny.random_plan(model, seed) for seed in (0, 1)]
    expected = [by_processors_of(model, plan) for plan in plans]
    first = PreparedPlan(model, plans[0], batch=2)
    moved = copies(model)
    second = PreparedPlan(model, plans[1], batch=2)
    unpruned = PreparedPlan(model, plans[1], batch=2, prune=False)
    assert not changed(model, moved)
    assert first.weight_bytes() == unpruned.weight_bytes() == 0 < second.weight_bytes()
    assert_steps(model, plans[1], second, expected[1])
    assert_steps(model, plans[0], first, expected[0])
    first.drop()
    assert not changed(model, moved)
    assert_steps(model, plans[1], second, expected[1])
    unpruned.drop()
    second.drop()
    assert not changed(model, before)


def test_the_plain_backend_runs_beside_it(kind: str) -> None:
    model = MODELS[kind]()
    plan = scattered(model)
    expected = by_processors_of(model, plan)
    held = PreparedPlan(model, plan, batch=2)
    assert orders_of(model)
    for got, sample in zip(by_processors_of(model, plan), expected, strict=True):
        torch.testing.assert_close(got, sample, atol=2e-6, rtol=1e-5)
    held.drop()


def test_a_failure_while_it_is_made_leaves_no_trace(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind]()
    before, plan = copies(model), scattered(model)
    gather, calls = reordered._gather, []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise MemoryError
        gather(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reordered, "_gather", fail)
        with pytest.raises(MemoryError):
            PreparedPlan(model, plan, batch=2)
    assert len(calls) > 4 and not changed(model, before) and not orders_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "Contribution", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            PreparedPlan(model, plan, batch=2)
    assert not changed(model, before) and not orders_of(model)


def test_what_a_forgotten_plan_left_is_put_back_by_the_next() -> None:
    model = MODELS["flux"]()
    before, sample = copies(model), sample_of(model)
    held = PreparedPlan(model, scattered(model), batch=2)
    bucket = held.buckets[1]
    moved = copies(model)
    del held
    gc.collect()
    second = PreparedPlan(model, tiny.random_plan(model, seed=1), batch=2)
    assert not changed(model, moved)  # the bucket counts on it
    with bucket.installed():
        pass
    second.drop()
    del bucket, second
    gc.collect()  # writes no weights, from wherever it is called
    assert not changed(model, moved) and orders_of(model)
    torch.testing.assert_close(sample_of(model), sample, atol=2e-6, rtol=1e-5)
    PreparedPlan(model, scattered(model), batch=2).drop()
    assert not changed(model, before) and not orders_of(model)


def test_a_bucket_of_a_dropped_plan_is_refused() -> None:
    model = MODELS["flux"]()
    held = PreparedPlan(model, scattered(model), batch=2)
    bucket = held.buckets[1]
    held.drop()
    with (
        pytest.raises(ArrowheadError, match="after the plan was closed"),
        bucket.installed(),
    ):
        pass


def test_weights_loaded_meanwhile_are_left_as_they_are() -> None:
    model = MODELS["flux"]()
    before = copies(model)
    held = PreparedPlan(model, scattered(model), batch=2)
    layer = "single_transformer_blocks.0.attn.to_q"
    assert f"{layer}.weight" in changed(model, before)
    own = {name: w for name, w in before.items() if name.startswith(layer)}
    model.load_state_dict(own, strict=False)
    with pytest.warns(UserWarning, match="2 attention weights were written"):
        held.drop()
    assert not changed(model, before)


def test_a_model_moved_meanwhile_comes_back_in_its_own_order() -> None:
    model = MODELS["flux"]()
    before = copies(model)
    held = PreparedPlan(model, scattered(model), batch=2)
    model.to(torch.float64)  # as .to(device): other memory under the same parameters
    held.drop()
    assert not changed(model.to(torch.float32), before)


def _in_file(model: nn.Module, folder: Path) -> Tensor:
    layer = model.get_parameter("single_transformer_blocks.0.attn.to_q.weight")
    mapped = torch.from_file(
        str(folder / "w.bin"), shared=True, size=layer.numel(), dtype=layer.dtype
    ).view_as(layer)
    mapped.copy_(layer.detach())
    layer.data = mapped
    return layer


def _tied(model: nn.Module, _: Path) -> Tensor:
    first, second = (
        model.get_submodule(f"single_transformer_blocks.{i}.attn.to_q") for i in (0, 1)
    )
    second.weight = first.weight
    return first.weight  # type: ignore[return-value]


def _overlapping(model: nn.Module, _: Path) -> Tensor:
    layer = model.get_parameter("single_transformer_blocks.0.attn.to_q.weight")
    memory = torch.randn(2, layer.numel())
    layer.data = memory[0].view_as(layer)
    model.register_buffer("flat", memory)
    return layer


def _strided(model: nn.Module, _: Path) -> Tensor:
    layer = model.get_parameter("single_transformer_blocks.0.attn.to_q.weight")
    layer.data = layer.detach().T.contiguous().T
    return layer


class _Quantised(nn.Parameter):
    pass


def _subclass(model: nn.Module, _: Path) -> Tensor:
    attn = model.get_submodule("single_transformer_blocks.0.attn")
    attn.to_q.weight = _Quantised(attn.to_q.weight.detach())
    return attn.to_q.weight  # type: ignore[return-value]


@pytest.mark.parametrize("spoil", [_in_file, _tied, _overlapping, _strided, _subclass])
def test_weights_that_are_not_the_modules_own_are_copied_from(
    spoil: Callable[[nn.Module, Path], Tensor], tmp_path: Path
) -> None:
    model: Any = MODELS["flux"]()
    weight = spoil(model, tmp_path)
    plan = scattered(model)
    expected, before = by_processors_of(model, plan), weight.detach().clone()
    state = copies(model)
    held = PreparedPlan(model, plan, batch=2)
    assert torch.equal(weight, before)
    name = "single_transformer_blocks.0.attn"
    # The whole module stays: q and k must not go apart.
    assert name not in orders_of(model) and not {n for n in changed(model, state) if name in n}
    assert orders_of(model) and held.weight_bytes() > 0
    assert_steps(model, plan, held, expected)
    held.drop()
    assert not changed(model, state)


def test_inference_tensors_are_moved_too() -> None:
    with torch.inference_mode():
        model = MODELS["sd3"]()
    assert next(model.parameters()).is_inference()
    before = copies(model)
    held = PreparedPlan(model, scattered(model), batch=2)
    assert changed(model, before)
    held.drop()
    assert not changed(model, before)
