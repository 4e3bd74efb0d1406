"""ArrowheadTransformer inside diffusers' own pipelines: results, contexts, refusals."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
)

from plans.errors import ArrowheadError
from plans.plan import Plan
from tests import tiny
from tests.trt_runtime.tiny_bundles import SIGMAS, call, tiny_model, tiny_pipeline, torch_proxy
from trt_runtime import attach, detach
from trt_runtime.transformer import ArrowheadTransformer


@pytest.fixture(params=["sd3", "flux"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make(kind: str, **options: Any) -> tuple[Any, ArrowheadTransformer, Plan]:
    model = tiny_model(kind)
    plan = tiny.random_plan(model)
    proxy = torch_proxy(model, plan, 2 if kind == "sd3" else 1, **options)
    return tiny_pipeline(model), proxy, plan


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_dense_bundle_gives_the_pipelines_own_latents(kind: str, quiet: None) -> None:
    pipe, proxy, _ = make(kind, dense=True)
    expected = call(pipe)
    attach(pipe, proxy)
    assert torch.equal(call(pipe), expected)


def test_plan_changes_the_latents_and_repeats_exactly(kind: str, quiet: None) -> None:
    pipe, proxy, plan = make(kind)
    dense = call(pipe)
    attach(pipe, proxy)
    first = call(pipe)
    # Caches are poisoned with NaN between the runs: a stale or early read would show.
    assert torch.equal(call(pipe), first)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, dense)
    assert [bucket for bucket, _ in proxy.state.step_seconds] == list(plan.schedule)


def test_detach_restores_everything(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    before = pipe.transformer
    expected = call(pipe)
    size = pipe.default_sample_size
    attach(pipe, proxy)
    assert pipe.transformer is proxy
    assert detach(pipe) is before
    assert "set_timesteps" not in vars(pipe.scheduler)
    assert "load_lora_weights" not in vars(pipe)
    assert pipe.default_sample_size == size
    assert torch.equal(call(pipe), expected)
    with pytest.raises(ArrowheadError, match="detach .* a pipeline that .*attach changed"):
        detach(pipe)


def test_attach_again_replaces(kind: str) -> None:
    pipe, proxy, plan = make(kind)
    model = pipe.transformer
    dense = torch_proxy(model, plan, 2 if kind == "sd3" else 1, dense=True)
    expected = call(pipe)
    attach(pipe, proxy)
    attach(pipe, dense)
    assert torch.equal(call(pipe), expected)
    assert detach(pipe) is model


def test_true_cfg_of_flux_has_a_cache_per_context() -> None:
    pipe, proxy, _ = make("flux")
    attach(pipe, proxy)
    generator = torch.Generator().manual_seed(9)
    negative = {
        "negative_prompt_embeds": torch.randn(
            1, tiny.TEXT_TOKENS, tiny.JOINT_DIM, generator=generator
        ),
        "negative_pooled_prompt_embeds": torch.randn(1, tiny.POOLED_DIM, generator=generator),
    }
    single = call(pipe)
    one_context = proxy.state.cache_bytes()
    # With a scale that hardly counts the negative branch, the picture is the single one: the
    # negative calls between must not touch the positive ones' caches.
    both = call(pipe, true_cfg_scale=1.0 + 1e-6, **negative)
    assert proxy.state.cache_bytes() == 2 * one_context
    torch.testing.assert_close(both, single, atol=1e-4, rtol=0)


def test_another_number_of_steps_is_refused(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    attach(pipe, proxy)
    with pytest.raises(ArrowheadError, match="denoising steps .* got 4; expected 6"):
        call(pipe, steps=4)
    assert torch.isfinite(call(pipe)).all()


def test_other_sigmas_are_refused(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    attach(pipe, proxy)
    with pytest.raises(ArrowheadError, match="sigmas .* at step"):
        call(pipe, sigmas=[s**1.1 for s in SIGMAS])


def test_guidance_off_is_refused_in_sd3() -> None:
    pipe, proxy, _ = make("sd3")
    attach(pipe, proxy)
    with pytest.raises(ArrowheadError, match="classifier-free guidance .* got off"):
        call(pipe, guidance_scale=1.0)


def test_another_guidance_scale_warns(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    attach(pipe, proxy)
    with pytest.warns(UserWarning, match="guidance_scale 3.0 differs"):
        call(pipe, guidance_scale=3.0)


@pytest.mark.parametrize("change", [{"steps": 4}, {"sigmas": [s**1.1 for s in SIGMAS]}])
def test_on_mismatch_dense_runs_every_head_in_full(kind: str, change: dict[str, Any]) -> None:
    pipe, proxy, _ = make(kind)
    expected = call(pipe, **change)
    attach(pipe, proxy, on_mismatch="dense")
    with pytest.warns(UserWarning, match="every head in full") as caught:
        got = call(pipe, **change)
    assert len([w for w in caught if "every head in full" in str(w.message)]) == 1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    # The plan is back as soon as the sampler fits again.
    call(pipe)
    assert {bucket for bucket, _ in proxy.state.step_seconds} != {0}


def test_on_mismatch_names_its_values() -> None:
    pipe, proxy, _ = make("sd3")
    with pytest.raises(ArrowheadError, match="on_mismatch .* got ignore; expected one of"):
        attach(pipe, proxy, on_mismatch="ignore")


def test_on_mismatch_dense_needs_a_graph_that_is_all_full(kind: str) -> None:
    model = tiny_model(kind)
    plan = tiny.random_plan(model)
    arrows = tiny.with_first_arrows(plan)
    pipe = tiny_pipeline(model)
    own = pipe.transformer
    proxy = torch_proxy(model, arrows, 2 if kind == "sd3" else 1)
    message = "on_mismatch .* got dense, and a plan without .* --first-step full"
    with pytest.raises(ArrowheadError, match=message):
        attach(pipe, proxy, on_mismatch="dense")
    assert pipe.transformer is own
    attach(pipe, proxy)
    call(pipe)
    assert proxy.state.buckets_run == list(plan.schedule)
    # It may be another step's graph that is all full.
    buckets = (arrows.buckets[0], plan.buckets[0], plan.buckets[2])
    later = replace(plan, buckets=buckets, schedule=(0, 1, 2, 1, 2, 1))
    expected = call(tiny_pipeline(model), steps=4)
    attach(pipe, torch_proxy(model, later, 2 if kind == "sd3" else 1), on_mismatch="dense")
    with pytest.warns(UserWarning, match="every head in full"):
        got = call(pipe, steps=4)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert set(pipe.transformer.state.buckets_run) == {1}


def test_scheduler_with_two_calls_a_step_is_refused(kind: str) -> None:
    model = tiny_model(kind)
    proxy = torch_proxy(model, tiny.random_plan(model), 2 if kind == "sd3" else 1)
    pipe = tiny_pipeline(model, FlowMatchHeunDiscreteScheduler())
    attach(pipe, proxy)
    with pytest.raises(ArrowheadError, match="FlowMatchHeun.* 2 transformer calls a step"):
        pipe.scheduler.set_timesteps(6)


def test_scheduler_without_sigmas_is_refused() -> None:
    from diffusers import DDIMScheduler

    pipe, proxy, _ = make("sd3")
    pipe.scheduler = DDIMScheduler()
    attach(pipe, proxy)
    with pytest.raises(ArrowheadError, match="DDIMScheduler .* got no sigmas"):
        pipe.scheduler.set_timesteps(6)


def img2img(pipe: Any, **options: Any) -> Any:
    empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    other = FluxImg2ImgPipeline(scheduler=pipe.scheduler, transformer=pipe.transformer, **empty)
    other.set_progress_bar_config(disable=True)
    rows, columns = tiny.HEIGHT // 16, tiny.WIDTH // 16
    return other(
        image=torch.zeros(1, 3, tiny.HEIGHT, tiny.WIDTH),
        prompt_embeds=torch.zeros(1, tiny.TEXT_TOKENS, tiny.JOINT_DIM),
        pooled_prompt_embeds=torch.zeros(1, tiny.POOLED_DIM),
        latents=torch.zeros(1, rows * columns, 16),
        height=tiny.HEIGHT,
        width=tiny.WIDTH,
        num_inference_steps=6,
        sigmas=SIGMAS,
        output_type="latent",
        **options,
    )


@pytest.fixture
def no_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let img2img start from its noise: only where in the schedule it starts is of interest."""

    def latents(self: Any, *_: Any, **__: Any) -> Any:
        ids = self._prepare_latent_image_ids(
            1, tiny.HEIGHT // 16, tiny.WIDTH // 16, "cpu", torch.float32
        )
        return torch.zeros(1, len(ids), 16), ids

    monkeypatch.setattr(FluxImg2ImgPipeline, "prepare_latents", latents)


def test_start_in_mid_schedule_is_refused(no_vae: None) -> None:
    pipe, proxy, _ = make("flux")
    attach(pipe, proxy)
    with pytest.raises(ArrowheadError, match="start in mid-schedule .* which is step 3"):
        img2img(pipe, strength=0.5, guidance_scale=4.0)


def test_start_in_mid_schedule_runs_dense_where_allowed(no_vae: None) -> None:
    pipe, proxy, _ = make("flux")
    attach(pipe, proxy, on_mismatch="dense")
    with pytest.warns(UserWarning, match="starts at step 3: it runs dense"):
        img2img(pipe, strength=0.5, guidance_scale=4.0)
    assert [bucket for bucket, _ in proxy.state.step_seconds] == [0, 0, 0]


def test_lora_is_refused(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    attach(pipe, proxy)
    with pytest.raises(ArrowheadError, match="LoRA .* fuse it before the export"):
        pipe.load_lora_weights({"transformer.proj_out.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ArrowheadError, match="LoRA"):
        proxy.load_lora_adapter({})
    with pytest.raises(ArrowheadError, match="IP-Adapter"):
        proxy._load_ip_adapter_weights({})
    proxy.peft_config = {"default": object()}
    with pytest.raises(ArrowheadError, match="LoRA"):
        call(pipe)


def test_lora_on_the_replaced_transformer_is_refused(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    pipe.transformer.peft_config = {"default": object()}
    with pytest.raises(ArrowheadError, match="LoRA"):
        attach(pipe, proxy)


def test_another_model_is_refused() -> None:
    _, proxy, _ = make("sd3")
    other = tiny_pipeline(tiny.tiny_sd3(num_layers=2, dual_attention_layers=()))
    with pytest.raises(ArrowheadError, match="transformer config"):
        attach(other, proxy)
    with pytest.raises(ArrowheadError, match="transformer class"):
        attach(tiny_pipeline(tiny.tiny_flux()), proxy)


def test_replaced_scheduler_is_noticed(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    attach(pipe, proxy)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ArrowheadError, match="no scheduler.set_timesteps .* attach"):
        call(pipe)


def test_another_batch_is_refused(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    attach(pipe, proxy)
    with pytest.raises(
        ArrowheadError, match=r"rows of .* got \d; expected \d, a fixed number.* --batch \d"
    ):
        call(pipe, pictures=2)


def test_another_picture_size_is_refused(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    attach(pipe, proxy, on_mismatch="dense")
    with pytest.raises(ArrowheadError, match="picture size .* pass height=64, width=96"):
        call(pipe, height=96, width=96)


def test_another_text_length_is_refused(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    attach(pipe, proxy)
    text = torch.zeros(1, tiny.TEXT_TOKENS + 2, tiny.JOINT_DIM)
    change = {"prompt_embeds": text}
    if kind == "sd3":
        change["negative_prompt_embeds"] = text
    with pytest.raises(ArrowheadError, match="text length .* max_sequence_length"):
        call(pipe, **change)


def test_skip_layer_guidance_is_refused() -> None:
    pipe, proxy, _ = make("sd3")
    attach(pipe, proxy)
    with pytest.raises(ArrowheadError, match="skip_layers"):
        call(pipe, skip_guidance_layers=[1], skip_layer_guidance_stop=0.9)


def test_an_exception_in_a_callback_leaves_no_trace(kind: str) -> None:
    pipe, proxy, _ = make(kind)
    attach(pipe, proxy)
    expected = call(pipe)

    def cancel(*_: Any) -> dict[str, Any]:
        raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        call(pipe, callback_on_step_end=cancel)
    assert torch.equal(call(pipe), expected)
