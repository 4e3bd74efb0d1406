"""Compiled plans on a GPU: the kernel library, Inductor and CUDA graphs together."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from plans import ops
from plans.prepared_parts import SummedLinear, columns_of
from plugins.torch import library
from tests import tiny
from tests.plans.test_prepared import by_processors
from tests.testbed.models import TESTBED, missing
from tests.trt_runtime.test_compiled_pictures import PIPELINES
from tests.trt_runtime.test_torch_compiled import even_plan
from tests.trt_runtime.testbed_pictures import CAPTION, both, error, plan_of
from trt_runtime import attach, detach
from trt_runtime.kernels import use_kernels
from trt_runtime.pipeline import draw, load_source_pipeline
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
    compiled = CompiledPlan(model, plan, batch=2, compile="blocks", prune=prune)
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


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_three_buckets_take_the_weights_of_one(kind: str) -> None:
    model = model_of(kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plan = tiny.random_plan(model)
    use_kernels("cuda", torch.bfloat16)
    held = torch.cuda.memory_allocated()
    compiled = CompiledPlan(model, plan, batch=2, compile="none")
    grown = torch.cuda.memory_allocated() - held
    assert len(plan.buckets) == 3 and compiled.prepared.weight_bytes() == 0
    assert grown < compiled.prepared.cache_bytes() + 2**17  # tasks; a copied piece is larger
    for step in range(plan.steps):
        assert compiled.step(step, inputs_of(model, step)).isfinite().all()
    compiled.close()
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_inductor_reads_columns_where_they_lie() -> None:
    """FLUX's single blocks: 18 of 24 heads' columns of a matrix of 15360, none of them copied."""
    layer = torch.nn.Linear(15360, 3072, device="cuda", dtype=torch.bfloat16)
    piece = columns_of(layer, tuple(range(3, 21)), 128, bias=False)
    assert piece.weight.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
    project = torch.compile(SummedLinear(piece, [torch.randn(1, 64, 3072).cuda().bfloat16()]))
    x = torch.randn(1, 64, 18 * 128, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):  # the first compiles, and cuBLAS allocates
        project(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    project(x)
    assert torch.cuda.max_memory_allocated() - before < piece.weight.nbytes / 4


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


# Relative, of the final latents, bf16. On a CPU, uncompiled, 0.016 (SD3, six steps under guidance)
# and 0.006 (FLUX, eight steps) were measured; compiled code and kernels round in other places.
PICTURE_TOLERANCE = 0.05


@pytest.mark.parametrize("compile", ["blocks", "model"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_picture_is_the_plain_backends_twice(name: str, compile: str) -> None:
    started = time.perf_counter()
    plain, ours, _ = both(name, device="cuda", dtype=torch.bfloat16, compile=compile)
    first, second = error(ours[0], plain[0]), error(ours[1], plain[1])
    print(
        f"{name}, {compile}: errors {first:.4f}, {second:.4f}, picture to picture "
        f"{error(ours[1], ours[0]):.2e}, {time.perf_counter() - started:.0f} s"
    )
    assert max(first, second) < PICTURE_TOLERANCE
    assert error(ours[1], ours[0]) < 1e-3


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_allocate_nothing_and_memory_returns(name: str) -> None:
    pipe = load_source_pipeline(str(TESTBED / name), dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    # Once without compiled code, so that what libraries allocate for good is there before.
    attach(pipe, plan=plan_of(name), backend="torch-compile", compile="none", cuda_graph=False)
    draw(pipe, [CAPTION], [1])
    detach(pipe)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    proxy = attach(pipe, plan=plan_of(name), backend="torch-compile")
    pipe.transformer.prepare()
    steps: list[int] = []
    draw(pipe, [CAPTION], [1], on_step=lambda *_: steps.append(torch.cuda.memory_allocated()))
    held = torch.cuda.memory_allocated()
    draw(pipe, [CAPTION], [2], on_step=lambda *_: steps.append(torch.cuda.memory_allocated()))
    assert torch.cuda.memory_allocated() <= held + 2**20
    assert max(steps[1:]) - min(steps[1:]) < 2**20  # the pipeline's own tensors come and go
    seconds = [spent for _, spent in proxy.state.step_seconds]
    assert len(seconds) == len(steps) // 2 and min(seconds) > 0
    detach(pipe)
    del proxy
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.skipif(bool(missing("tiny-flux")), reason="tiny-flux is not saved")
def test_a_second_context_has_graphs_of_its_own() -> None:
    """FLUX's true CFG at a scale that hardly counts: the picture is the single one."""
    name = "tiny-flux"
    pipe = load_source_pipeline(str(TESTBED / name), dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    proxy = attach(pipe, plan=plan_of(name), backend="torch-compile", poison=True)
    single = draw(pipe, [CAPTION], [3])[0].latents
    nbytes = proxy.state.cache_bytes()
    for _ in range(2):
        both_rows = draw(pipe, [CAPTION], [3], true_cfg_scale=1.0 + 1e-6, negative_prompt="none")
        assert error(both_rows[0].latents, single) < PICTURE_TOLERANCE
    assert proxy.state.cache_bytes() == 2 * nbytes
    detach(pipe)
