"""Single calls of the drop-in transformer: the contract of diffusers' forward, and its breaches."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from plans.errors import ArrowheadError
from tests import tiny
from tests.trt_runtime.tiny_bundles import STEPS, tiny_model, torch_proxy
from trt_runtime.transformer import (
    ArrowheadFluxTransformer,
    ArrowheadSD3Transformer,
    ArrowheadTransformer,
)

TIMESTEPS = [1000 * (1 - i / STEPS) for i in range(STEPS)]


@pytest.fixture(params=["sd3", "flux"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def started(kind: str, **options: Any) -> tuple[ArrowheadTransformer, Any, dict[str, Any]]:
    model = tiny_model(kind)
    proxy = torch_proxy(model, tiny.random_plan(model), 2, **options)
    proxy.state.begin(TIMESTEPS)
    return proxy, model, at_step(model, 0)


def at_step(model: Any, step: int) -> dict[str, Any]:
    inputs = tiny.inputs_of(model)
    scale = 1.0 if isinstance(model, SD3Transformer2DModel) else 1e-3
    inputs["timestep"] = torch.full((2,), TIMESTEPS[step] * scale)
    return inputs


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ArrowheadSD3Transformer, SD3Transformer2DModel),
        (ArrowheadFluxTransformer, FluxTransformer2DModel),
    ],
)
def test_keywords_are_those_of_diffusers(ours: Any, theirs: Any) -> None:
    got = list(inspect.signature(ours.forward).parameters)
    assert got == list(inspect.signature(theirs.forward).parameters)


def test_return_dict_both_ways(kind: str) -> None:
    proxy, model, inputs = started(kind, dense=True)
    with torch.no_grad():
        expected = model(**inputs).sample
    assert torch.equal(proxy(**inputs).sample, expected)
    proxy.state.begin(TIMESTEPS)
    assert torch.equal(proxy(**inputs, return_dict=False)[0], expected)


def test_components_protocol(kind: str) -> None:
    proxy, model, _ = started(kind)
    assert proxy.config.in_channels == model.config.in_channels
    assert proxy.config["in_channels"] == model.config["in_channels"]
    assert proxy.dtype == torch.float32
    assert proxy.device == torch.device("cpu")
    assert not list(proxy.parameters())
    assert proxy.to("cpu") is proxy


def test_output_is_a_fresh_tensor_in_the_callers_dtype(kind: str) -> None:
    proxy, model, inputs = started(kind)
    first = proxy(**inputs, return_dict=False)[0]
    kept = first.clone()
    second_inputs = at_step(model, 1)
    second_inputs["hidden_states"] = first.double()
    second = proxy(**second_inputs, return_dict=False)[0]
    assert torch.equal(first, kept)
    assert second.dtype == torch.float64
    assert first.data_ptr() != second.data_ptr()


def test_contexts_count_alone(kind: str) -> None:
    proxy, _, inputs = started(kind)
    for name in ("cond", "uncond"):
        with proxy.cache_context(name):
            proxy(**inputs)
    assert [proxy.state.step_of(name) for name in ("cond", "uncond", "default")] == [1, 1, 0]


def test_a_second_call_in_a_step_is_refused(kind: str) -> None:
    proxy, _, inputs = started(kind)
    proxy(**inputs)
    with pytest.raises(ArrowheadError, match="timestep of step 1 .* got 1000; expected 833"):
        proxy(**inputs)


def test_any_exception_resets(kind: str) -> None:
    proxy, _, inputs = started(kind)
    proxy(**inputs)
    with pytest.raises(ArrowheadError):
        proxy(**inputs)
    with pytest.raises(ArrowheadError, match="no scheduler.set_timesteps since"):
        proxy(**inputs)
    proxy.state.begin(TIMESTEPS)
    assert torch.isfinite(proxy(**inputs, return_dict=False)[0]).all()


def test_more_calls_than_steps_are_refused(kind: str) -> None:
    proxy, model, inputs = started(kind)
    proxy.state.begin(TIMESTEPS[:1], dense=True)
    proxy(**inputs)
    with pytest.raises(ArrowheadError, match="call 2 of context 'default' .* 1 calls"):
        proxy(**at_step(model, 1))


def test_call_without_attach_is_refused(kind: str) -> None:
    model = tiny_model(kind)
    proxy = torch_proxy(model, tiny.random_plan(model), 2)
    with pytest.raises(ArrowheadError, match=r"no scheduler.set_timesteps .* trt_runtime.attach"):
        proxy(**at_step(model, 0))


REFUSED = [
    ("sd3", {"block_controlnet_hidden_states": [torch.zeros(1)]}, "ControlNet residuals"),
    ("sd3", {"skip_layers": [1]}, "skip_layers"),
    ("flux", {"controlnet_block_samples": [torch.zeros(1)]}, "ControlNet residuals"),
    ("flux", {"controlnet_single_block_samples": [torch.zeros(1)]}, "ControlNet residuals"),
    ("flux", {"joint_attention_kwargs": {"ip_adapter_image_embeds": [1]}}, "IP-Adapter"),
    ("sd3", {"joint_attention_kwargs": {"ip_adapter_image_embeds": [1]}}, "IP-Adapter"),
    ("sd3", {"joint_attention_kwargs": {"scale": 0.5}}, "LoRA"),
    ("flux", {"joint_attention_kwargs": {"attention_mask": 1}}, r"joint_attention_kwargs .*mask"),
    ("flux", {"txt_ids": torch.ones(tiny.TEXT_TOKENS, 3)}, "input txt_ids .* other values"),
    ("flux", {"img_ids": torch.zeros(24, 3)}, "input img_ids .* constants of the graph"),
    ("flux", {"img_ids": None}, "input img_ids .* got nothing"),
    ("flux", {"guidance": None}, "input guidance .* got nothing"),
    ("sd3", {"pooled_projections": torch.zeros(2, 3)}, "input pooled_projections"),
    ("sd3", {"timestep": torch.zeros(())}, "input timestep"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), REFUSED)
def test_what_the_graph_cannot_take_is_refused(
    kind: str, arguments: dict[str, Any], message: str
) -> None:
    proxy, _, inputs = started(kind)
    with pytest.raises(ArrowheadError, match=message):
        proxy(**(inputs | arguments))


def test_empty_joint_attention_kwargs_pass(kind: str) -> None:
    proxy, _, inputs = started(kind)
    proxy(**inputs, joint_attention_kwargs={})


def test_half_precision_timesteps_are_recognised(kind: str) -> None:
    proxy, model, _ = started(kind)
    for step in range(STEPS):
        inputs = at_step(model, step)
        inputs["timestep"] = inputs["timestep"].bfloat16()
        proxy(**inputs)


def test_close_releases_the_engines(kind: str) -> None:
    proxy, _, inputs = started(kind)
    proxy(**inputs)
    assert proxy.state.cache_bytes() > 0
    proxy.close()
    assert proxy.state.cache_bytes() == 0
    proxy.state.begin(TIMESTEPS)
    with pytest.raises(ArrowheadError, match="outside its `with` block"):
        proxy(**inputs)
