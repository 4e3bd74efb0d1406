"""Plans under torch.compile: the same samples, one graph a block class and bucket, no breaks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from plans.architectures import ARCHITECTURES
from plans.errors import ArrowheadError
from plans.plan import Bucket, Plan
from plans.synthetic import Mix, synthetic_plan
from tests import tiny
from tests.plans.test_prepared import by_processors
from trt_runtime.torch_compiled import CompiledPlan, choose_compile

MODELS: dict[str, Callable[[], Any]] = {
    "sd3": lambda: tiny.tiny_sd3(num_layers=4),
    "flux": lambda: tiny.tiny_flux(num_layers=2, num_single_layers=3),
}
# Blocks of one class differ where their inputs or outputs do: SD3's with attn2, the others, the
# last; FLUX's double ones, its first single one (whose inputs are no views), the others.
CLASSES = 3


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def even_plan(model: Any) -> Plan:
    """As many heads of each mode in every module, in another order in each."""
    plan = tiny.random_plan(model)
    rng = random.Random(0)
    modes = {module.name: tuple(rng.sample((-1, 0, -2, -2), 4)) for module in plan.modules}
    return replace(plan, buckets=(plan.buckets[0], Bucket(modes)), schedule=(0, 1, 1, 0, 1, 1))


def counter() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_block_classes_are_compiled_once_for_each_bucket(kind: str, prune: bool) -> None:
    model = MODELS[kind]()
    plan, backend = even_plan(model), counter()
    expected = by_processors(model, plan)
    compiled = CompiledPlan(model, plan, batch=2, compile="blocks", prune=prune, compiler=backend)
    compiled.prepared.reset(math.nan)
    graphs = []
    for step in range(plan.steps):
        sample = compiled.step(step, tiny.inputs_of(model, step))
        torch.testing.assert_close(sample, expected[step], atol=2e-6, rtol=1e-5)
        graphs.append(backend.frame_count)
    # Unpruned, modes are an input: the second bucket needs no graph of its own.
    later = CLASSES * (2 if prune else 1)
    assert graphs == [CLASSES, *(later,) * (plan.steps - 1)]
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_searched_plan_compiles_whole_with_every_mode_and_module_all_cached(kind: str) -> None:
    model = MODELS[kind]()
    plan, backend = tiny.random_plan(model), counter()
    expected = by_processors(model, plan)
    compiled = CompiledPlan(model, plan, batch=2, compile="model", compiler=backend)
    compiled.prepared.reset(math.nan)
    for step in range(plan.steps):
        sample = compiled.step(step, tiny.inputs_of(model, step))
        torch.testing.assert_close(sample, expected[step], atol=2e-6, rtol=1e-5)
    assert backend.frame_count == len(plan.buckets)
    assert not counters["graph_break"]


def test_nothing_is_allocated_for_a_second_picture() -> None:
    model = MODELS["sd3"]()
    plan = even_plan(model)
    compiled = CompiledPlan(model, plan, batch=2, compile="none")

    def picture() -> list[int]:
        for step in range(plan.steps):
            compiled.step(step, tiny.inputs_of(model, step))
        caches = compiled.prepared.caches
        return [part.data_ptr() for name in sorted(caches) for part in caches[name]]

    assert picture() == picture()


def test_the_transformer_is_its_own_between_steps() -> None:
    model = MODELS["flux"]()
    plan = even_plan(model)
    inputs = tiny.inputs_of(model)
    before = model(**inputs, return_dict=False)[0]
    compiled = CompiledPlan(model, plan, batch=2, compile="blocks", compiler=counter())
    compiled.step(0, inputs)
    first = model.transformer_blocks[0]
    first._compiled_call_impl = own = lambda *_: None  # as block.compile() leaves one
    compiled.step(0, inputs)
    assert first._compiled_call_impl is own
    del first._compiled_call_impl
    between = model(**inputs, return_dict=False)[0]  # its heads lie in another order
    torch.testing.assert_close(between, before, atol=2e-6, rtol=1e-5)
    assert not any("_compiled_call_impl" in module.__dict__ for module in model.modules())
    compiled.close()
    assert torch.equal(model(**inputs, return_dict=False)[0], before)


def test_plans_are_compiled_by_blocks_where_many_are_alike() -> None:
    plan = synthetic_plan(
        ARCHITECTURES["flux.1-dev"], [Mix(6, 12, 4, 6), Mix(4, 10, 4, 10)], height=1024, width=1024
    )
    assert choose_compile(plan) == "blocks"
    rng = random.Random(1)
    searched = [plan.buckets[0]]
    for _ in plan.buckets[1:]:  # some modules keep few heads, some nearly all, as a search leaves
        rows = {}
        for module in plan.modules:
            share = rng.random()
            rows[module.name] = tuple(
                -2 if rng.random() < share else 0 for _ in range(module.heads)
            )
        searched.append(Bucket(rows))
    assert choose_compile(replace(plan, buckets=tuple(searched))) == "model"


def test_another_way_to_compile_is_refused() -> None:
    model = MODELS["flux"]()
    with pytest.raises(ArrowheadError, match="compile"):
        CompiledPlan(model, even_plan(model), batch=2, compile="layers")
