"""A plan on a plain pipeline: the same pictures as the search measured, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plans import reference, sdpa
from plans.errors import ArrowheadError
from plans.plan import Plan, dense_plan
from plans.processors import install
from plans.run import run_plan
from plans.strategies import MeasureHeads
from tests import tiny
from tests.trt_runtime.tiny_bundles import STEPS, call, tiny_model, tiny_pipeline


@pytest.fixture(params=["sd3", "flux"])
def made(request: pytest.FixtureRequest) -> tuple[Any, Plan]:
    model = tiny_model(request.param)
    return tiny_pipeline(model), tiny.random_plan(model, seed=3, buckets=4, steps=STEPS)


def measured(pipe: Any, plan: Plan, **arguments: Any) -> Tensor:
    heads = MeasureHeads(plan)
    undo = install(pipe.transformer, plan.modules, heads)
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: heads.begin_step(heads.step + 1))
    latents = call(pipe, **arguments)
    handle.remove()
    undo()
    return latents


def test_all_full_is_the_stock_pipeline(made: tuple[Any, Plan]) -> None:
    pipe, plan = made
    want = call(pipe, pictures=2)
    with run_plan(pipe, dense_plan(plan)):
        torch.testing.assert_close(call(pipe, pictures=2), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(call(pipe, pictures=2), want)


def test_a_run_is_what_the_search_measures(made: tuple[Any, Plan]) -> None:
    pipe, plan = made
    want = measured(pipe, plan, pictures=2)
    assert not torch.allclose(call(pipe, pictures=2), want, atol=1e-3)
    with run_plan(pipe, plan):
        torch.testing.assert_close(call(pipe, pictures=2), want, rtol=1e-4, atol=1e-5)


def test_pictures_do_not_see_those_before(made: tuple[Any, Plan]) -> None:
    pipe, plan = made
    with run_plan(pipe, plan) as heads:
        want = call(pipe, seed=1)
        call(pipe, seed=2, pictures=3)  # another batch size, too
        assert torch.equal(call(pipe, seed=1), want)
        heads.begin_step(0)
        assert not heads.caches
        call(pipe, seed=1)
    assert not heads.caches


def test_an_error_in_a_run_is_forgotten(made: tuple[Any, Plan]) -> None:
    pipe, plan = made

    def stop(_: Any, step: int, *__: Any) -> Any:
        if step == 2:
            raise RuntimeError("stop")
        return {}

    with run_plan(pipe, plan):
        want = call(pipe)
        with pytest.raises(RuntimeError, match="stop"):
            call(pipe, callback_on_step_end=stop)
        assert torch.equal(call(pipe), want)


def test_another_sampler_is_refused(made: tuple[Any, Plan]) -> None:
    pipe, plan = made
    with run_plan(pipe, plan):
        with pytest.raises(ArrowheadError, match=r"denoising steps \| got 4; expected 6"):
            call(pipe, steps=4)
        with pytest.raises(ArrowheadError, match="sigmas"):
            call(pipe, sigmas=[0.9 - i / 10 for i in range(STEPS)])


def test_two_calls_in_a_step_are_refused() -> None:
    model = tiny_model("flux")
    pipe = tiny_pipeline(model)
    plan = tiny.random_plan(model, steps=STEPS)
    negative = {
        "negative_prompt_embeds": torch.zeros(1, tiny.TEXT_TOKENS, tiny.JOINT_DIM),
        "negative_pooled_prompt_embeds": torch.zeros(1, tiny.POOLED_DIM),
    }
    with (
        run_plan(pipe, plan),
        pytest.raises(ArrowheadError, match="got a call at step 1; expected step 2: one call"),
    ):
        call(pipe, true_cfg_scale=2.0, **negative)


def test_another_model_is_refused(made: tuple[Any, Plan]) -> None:
    pipe, plan = made
    other = tiny.random_plan(tiny.tiny_sd3(num_layers=2))
    before = pipe.transformer.forward
    with pytest.raises(ArrowheadError, match="as planned"), run_plan(pipe, other):
        pass
    assert pipe.transformer.forward == before


TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
LAYOUTS = [(24, 5, True, 5, (-1, 0, 1, 0)), (33, 0, False, 8, (1, 1, 0)), (16, 7, False, 16, (0,))]


@pytest.mark.parametrize(("image", "text", "first", "block", "windows"), LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sdpa_is_the_reference_to_rounding(
    image: int, text: int, first: bool, block: int, windows: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, image + text, len(windows), 8).to(dtype) for _ in range(3))
    cache = torch.randn(2, image + text, 2, 8).to(dtype)
    scale = 8**-0.5
    attributes = dict(text_tokens=text, text_first=first, block=block, half_windows=windows)
    tolerance = {"rtol": 0, "atol": TOLERANCE[dtype]}
    want = reference.arrow_attention(q, k, v, scale=scale, **attributes)
    got = sdpa.arrow_attention(q, k, v, scale, **attributes)
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got, want, **tolerance)
    source = (len(windows), *range(len(windows)), len(windows) + 1)
    want = reference.cached_head(q, k, v, cache, scale=scale, **attributes, source=source)
    got = sdpa.cached_head(q, k, v, cache, scale, **attributes, source=source)
    torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sdpa_is_what_a_gpu_runs(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sdpa.register()  # other tests of the session may have put the kernels in its place
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 101, 4, 64, device="cuda").to(dtype) for _ in range(3))
    attributes = (0.125, 5, False, 16, [-1, 0, 1, 1])
    got = torch.ops.arrowhead.arrow_attention(q, k, v, *attributes)
    assert torch.equal(got, sdpa.arrow_attention(q, k, v, *attributes))
    want = sdpa.arrow_attention(*(x.float().cpu() for x in (q, k, v)), *attributes)
    torch.testing.assert_close(got.float().cpu(), want, rtol=0, atol=TOLERANCE[dtype])
