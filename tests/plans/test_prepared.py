"""A bucket prepared once does what the processors of plans.processors do at every step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from plans import ops
from plans.prepared import PreparedPlan
from plans.processors import install
from plans.run import PlanHeads
from tests import tiny

MODELS = {
    "sd3": lambda: tiny.tiny_sd3(),
    "sd3 without norms": lambda: tiny.tiny_sd3(qk_norm=None, dual_attention_layers=()),
    "flux": lambda: tiny.tiny_flux(),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def by_processors(model: Any, plan: Any) -> list[Tensor]:
    heads = PlanHeads(plan)
    undo = install(model, plan.modules, heads)
    samples = []
    for step in range(plan.steps):
        heads.begin_step(step)
        samples.append(model(**tiny.inputs_of(model, step), return_dict=False)[0])
    undo()
    return samples


@pytest.mark.parametrize("fuse_gelu", [True, False])
@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_all_steps_agree_with_the_processors(
    kind: str, seed: int, prune: bool, fuse_gelu: bool
) -> None:
    model = MODELS[kind]()
    plan = tiny.random_plan(model, seed)
    expected = by_processors(model, plan)
    prepared = PreparedPlan(model, plan, batch=2, prune=prune, fuse_gelu=fuse_gelu)
    prepared.reset(math.nan)  # a read before a write would show
    for step, bucket in enumerate(plan.schedule):
        prepared.use(bucket)
        with prepared.buckets[bucket].installed():
            sample = model(**tiny.inputs_of(model, step), return_dict=False)[0]
        torch.testing.assert_close(sample, expected[step], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_transformer_comes_back_as_it_was(kind: str) -> None:
    model = MODELS[kind]()
    inputs = tiny.inputs_of(model)
    before = model(**inputs, return_dict=False)[0]
    parts = {name: (id(m), set(m.__dict__)) for name, m in model.named_modules()}
    prepared = PreparedPlan(model, tiny.random_plan(model), batch=2)
    with pytest.raises(ZeroDivisionError), prepared.buckets[0].installed():
        assert {name: (id(m), set(m.__dict__)) for name, m in model.named_modules()} != parts
        raise ZeroDivisionError
    assert {name: (id(m), set(m.__dict__)) for name, m in model.named_modules()} == parts
    # Its heads lie in another order as long as the plan is there.
    between = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(between, before, atol=2e-6, rtol=1e-5)
    prepared.drop()
    assert torch.equal(model(**inputs, return_dict=False)[0], before)


def test_cached_heads_cost_no_projection() -> None:
    model = MODELS["flux"]()
    plan = tiny.random_plan(model)
    prepared = PreparedPlan(model, plan, batch=2)
    for (owner, _, part), module in zip(
        [entry for entry in prepared.buckets[1].replaced if entry[1] == "processor"],
        plan.modules,
        strict=True,
    ):
        computed = sum(mode != -2 for mode in plan.buckets[1].modes[module.name])
        rows = {linear.weight.shape[0] for linear in (*part.qkv, *part.text_qkv)}
        assert rows == {computed * module.head_dim}, owner


def test_caches_hold_what_is_added_to_the_projection() -> None:
    model = MODELS["sd3"]()
    plan = tiny.random_plan(model)
    prepared = PreparedPlan(model, plan, batch=2)
    width = tiny.HEADS * tiny.HEAD_DIM
    assert {part.shape[-1] for parts in prepared.caches.values() for part in parts} == {width}
    names = {module.name for module in plan.modules}
    assert {name.rpartition(".")[0] for name in prepared.caches} <= names
    assert prepared.cache_bytes() == sum(
        part.numel() * 4 for parts in prepared.caches.values() for part in parts
    )


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_attend_is_the_same_in_one_piece_and_in_two(text_first: bool, parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, text, heads = 13, 3, 4
    q, k, v = (torch.randn(2, tokens, 3, 8, generator=generator) for _ in range(3))
    cache = torch.randn(2, tokens, 2, 8, generator=generator)
    tasks = torch.tensor([[-1, 2, -1], [-2, 1, -1], [0, 0, -1], [1, 1, -1]], dtype=torch.int32)
    args = (0.3, text, text_first, 4)
    out = ops.attend(
        *(ops.split_tokens(x, parts, text, text_first) for x in (q, k, v, cache)), tasks, *args
    )
    assert len(out) == parts and all(part.shape[2] == heads for part in out)
    computed = ops.arrow_attention(q[:, :, [2, 0, 1]], k[:, :, [2, 0, 1]], v[:, :, [2, 0, 1]],
                                   *args, [-1, 0, 1])  # fmt: skip
    expected = torch.stack(
        [computed[:, :, 0], cache[:, :, 1], computed[:, :, 1], computed[:, :, 2]], dim=2
    )
    torch.testing.assert_close(ops.join_tokens(out, text_first)[0], expected)


def test_operators_pass_opcheck() -> None:
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6)
    torch.library.opcheck(ops.linear_gelu, (x, weight, bias))
    q = [torch.randn(1, 9, 2, 8)]
    tasks = torch.tensor([[-1, 0, -1], [1, 1, -1]], dtype=torch.int32)
    torch.library.opcheck(
        ops.attend, (q, q, q, [], tasks, 0.3, 0, False, 4),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
