"""Whole pipelines around a bundle, on the PyTorch backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from plans.bundle import EngineSpec, load_bundle, save_bundle
from plans.errors import ArrowheadError
from tests import tiny
from tests.trt_runtime.conftest import Made
from trt_runtime import detach, load_pipeline, load_transformer, pipeline_kwargs
from trt_runtime.pipeline import generate, load_source_pipeline, pictures_per_call

Bundles = Callable[[str], Made]
PROMPTS = ["a cat", "a dog", "a tree"]


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_load_and_generate(
    kind: str, torch_bundle: Bundles, prompts_without_encoders: None
) -> None:
    folder, _, plan = torch_bundle(kind)
    pipe = load_pipeline(folder, backend="torch")
    pipe.set_progress_bar_config(disable=True)
    pictures = generate(pipe, PROMPTS, seed=3)
    assert [p.seed for p in pictures] == [3, 4, 5]
    assert pictures[0].image.size == (tiny.WIDTH, tiny.HEIGHT)
    assert torch.isfinite(pictures[0].latents).all()
    assert [bucket for bucket, _ in pictures[0].step_seconds] == list(plan.schedule)
    again = generate(pipe, PROMPTS[1:], seed=4)
    assert torch.equal(again[0].latents, pictures[1].latents)
    assert np.array_equal(np.asarray(again[1].image), np.asarray(pictures[2].image))
    assert detach(pipe) is None


@pytest.mark.parametrize(("kind", "text"), [("sd3", tiny.TEXT_TOKENS - 77), ("flux", 5)])
def test_pipeline_kwargs_are_the_plans(kind: str, text: int, torch_bundle: Bundles) -> None:
    plan = torch_bundle(kind)[2]
    assert pipeline_kwargs(plan, SimpleNamespace(tokenizer_max_length=77)) == {
        "height": tiny.HEIGHT,
        "width": tiny.WIDTH,
        "num_inference_steps": 6,
        "guidance_scale": 4.0,
        "max_sequence_length": text,
    }


def test_surplus_rows_are_filled_and_dropped(
    torch_bundle: Bundles, prompts_without_encoders: None, tmp_path: Any
) -> None:
    """A bundle of two pictures a call makes three, each as a bundle of one makes it."""
    from tests.trt_runtime.tiny_bundles import torch_proxy
    from trt_runtime import attach

    folder, _, plan = torch_bundle("sd3")
    pipe = load_pipeline(folder, backend="torch")
    pipe.set_progress_bar_config(disable=True)
    expected = generate(pipe, PROMPTS, seed=1)
    wide = torch_proxy(tiny.tiny_sd3(), plan, 4)
    attach(pipe, wide)
    assert pictures_per_call(wide) == 2
    got = generate(pipe, PROMPTS, seed=1)
    assert [p.prompt for p in got] == PROMPTS
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.latents, b.latents, atol=1e-4, rtol=1e-4)


def test_unknown_backend_is_refused(torch_bundle: Bundles) -> None:
    with pytest.raises(ArrowheadError, match="backend .* got tpu; expected one of onnxruntime"):
        load_transformer(torch_bundle("sd3")[0], backend="tpu")


def test_bundle_without_dense_graph_says_so(torch_bundle: Bundles, tmp_path: Any) -> None:
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(torch_bundle("sd3")[0], folder)
    save_bundle(replace(load_bundle(folder), dense=None), folder)
    with pytest.raises(ArrowheadError, match="got no dense graph"):
        load_transformer(folder, backend="torch", dense=True)


def test_missing_source_is_explained(torch_bundle: Bundles, tmp_path: Any) -> None:
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(torch_bundle("sd3")[0], folder)
    bundle = load_bundle(folder)
    save_bundle(replace(bundle, model={**bundle.model, "source": None}), folder)
    with pytest.raises(ArrowheadError, match="model of bundle .* got no source"):
        load_pipeline(folder, backend="torch")


def test_unsupported_pipeline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trt_runtime import pipeline

    monkeypatch.setattr(pipeline, "load_pretrained", lambda *_, **__: SimpleNamespace())
    with pytest.raises(ArrowheadError, match="got SimpleNamespace; expected StableDiffusion3"):
        load_source_pipeline("somewhere", dtype=torch.float32)


def test_transformer_of_another_dtype_is_refused(torch_bundle: Bundles) -> None:
    with pytest.raises(ArrowheadError, match="transformer dtype .* torch_dtype=torch.float32"):
        load_transformer(
            torch_bundle("sd3")[0], backend="torch", transformer=tiny.tiny_sd3().half()
        )


def test_unverified_engines_warn(torch_bundle: Bundles) -> None:
    from trt_runtime.bundles import warn_unverified

    bundle = replace(
        torch_bundle("sd3")[1], engines=(EngineSpec("onnxruntime", 1, None, False, 1.0, {}),)
    )
    with pytest.warns(UserWarning, match=r"buckets \[1\] on onnxruntime were built but never run"):
        warn_unverified(bundle, "onnxruntime")
