"""Compiled plans on a GPU: the kernel library, Inductor and CUDA graphs together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from plans import ops
from plugins.torch import library
from tests import tiny
from tests.plans.test_prepared import by_processors
from tests.trt_runtime.test_torch_compiled import even_plan
from trt_runtime.kernels import use_kernels
from trt_runtime.torch_compiled import CompiledPlan

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU: compiled plans are not run on one", allow_module_level=True)
if library.find_library() is None:
    pytest.skip("no libarrowhead.so: run `make plugins`", allow_module_level=True)

SIZES: dict[str, Any] = {"attention_head_dim": 64}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def model_of(kind: str) -> Any:
    if kind == "flux":
        model = tiny.tiny_flux(num_single_layers=3, axes_dims_rope=(16, 24, 24), **SIZES)
    else:
        model = tiny.tiny_sd3(caption_projection_dim=4 * 64, **SIZES)
    return model.to("cuda", torch.bfloat16)


def inputs_of(model: Any, step: int) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in tiny.inputs_of(model, step).items()}


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_graphs_give_what_the_processors_give_and_allocate_nothing(
    kind: str, prune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    plan = even_plan(model)
    use_kernels("cuda", torch.bfloat16)
    own = tiny.inputs_of
    monkeypatch.setattr(
        tiny, "inputs_of", lambda m, step: {n: v.cuda() for n, v in own(m, step).items()}
    )
    expected = [sample.clone() for sample in by_processors(model, plan)]
    monkeypatch.undo()
    compiled = CompiledPlan(model, plan, batch=2, prune=prune)
    compiled.prepared.reset(math.nan)
    for step in range(plan.steps):
        assert error(compiled.step(step, inputs_of(model, step)), expected[step]) < 0.02
    inputs = [inputs_of(model, step) for step in range(plan.steps)]
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        for step in range(plan.steps):
            assert error(compiled.step(step, inputs[step]), expected[step]) < 0.02
    assert torch.cuda.memory_allocated() <= before + 4096  # the scalars of `error`
    compiled.close()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_attend_with_tasks_on_the_device_is_the_reference(
    parts: int, text_first: bool, head_dim: int
) -> None:
    use_kernels("cuda", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    text = 77
    shape = (2, 1024 + text, 3, head_dim)
    q, k, v, cache = (torch.randn(shape, generator=generator).bfloat16() for _ in range(4))
    tasks = torch.tensor(
        [[-1, 2, -1], [-2, 1, -1], [0, 0, -1], [3, 1, -1], [-2, 0, -1]], dtype=torch.int32
    )
    arguments = (head_dim**-0.5, text, text_first, 128)
    split = [ops.split_tokens(x, parts, text, text_first) for x in (q, k, v, cache)]
    expected = ops.attend(*split, tasks, *arguments)
    got = ops.attend(*([x.cuda() for x in pair] for pair in split), tasks.cuda(), *arguments)
    for a, b in zip(got, expected, strict=True):
        assert error(a.cpu(), b) < 0.01


def test_linear_gelu_is_the_two_operators() -> None:
    x, weight, bias = (torch.randn(s, device="cuda").bfloat16() for s in ((2, 99, 64), (256, 64),
                                                                          (256,)))  # fmt: skip
    expected = torch.nn.functional.gelu(
        torch.nn.functional.linear(x.float(), weight.float(), bias.float()), approximate="tanh"
    )
    assert error(ops.linear_gelu(x, weight, bias), expected) < 0.01
