"""The saved pipelines: small, of diffusers' own classes, and true to their captions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file

from plans.models import model_spec
from tests.testbed import models, reader, scenes
from tests.testbed.conftest import require
from tests.testbed.evaluate import generate, held_out_captions
from tests.testbed.models import TESTBED

KINDS = {"tiny-sd3": StableDiffusion3Pipeline, "tiny-flux": FluxPipeline}
MAX_BYTES = 32 * 2**20
SD3_OPTIONS = {"prompt_3": None, "do_classifier_free_guidance": False}
LEAST_ACCURACY = 0.8


@pytest.fixture(scope="module", params=models.NAMES)
def pipe(request: pytest.FixtureRequest) -> Any:
    require(request.param)
    return KINDS[request.param].from_pretrained(TESTBED / request.param, torch_dtype=torch.float32)


@pytest.mark.parametrize("name", models.NAMES)
def test_files_are_small_and_in_half_precision(name: str) -> None:
    require(name)
    files = [path for path in (TESTBED / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {w.dtype for path in weights for w in load_file(path).values()} == {torch.float16}


def test_geometry(pipe: Any) -> None:
    config = {**pipe.transformer.config, "_class_name": type(pipe.transformer).__name__}
    spec = model_spec(
        config,
        height=scenes.SIDE,
        width=scenes.SIDE,
        vae_scale_factor=pipe.vae_scale_factor,
        text_tokens=models.T5_LENGTH,
        block=16,
    )
    for module in spec.modules:
        assert (module.heads, module.head_dim) == (4, 64)
        assert module.layout.image_tokens >= 1024
        assert module.layout.text_first == isinstance(pipe, FluxPipeline)


@torch.no_grad()
def test_text_is_encoded_as_the_pipeline_does(pipe: Any) -> None:
    captions = [*held_out_captions(2), ""]
    options = {} if isinstance(pipe, FluxPipeline) else SD3_OPTIONS
    want = pipe.encode_prompt(
        captions, prompt_2=None, max_sequence_length=models.T5_LENGTH, **options
    )
    ids = models.token_ids(pipe, captions)
    sequence, pooled = models.encode_text(models.text_encoders(pipe), *ids)
    torch.testing.assert_close(sequence, want[0])
    torch.testing.assert_close(pooled, want[1 if isinstance(pipe, FluxPipeline) else 2])


@pytest.mark.slow
def test_pictures_follow_their_captions(pipe: Any) -> None:
    captions = held_out_captions(4)
    pictures = generate(pipe, captions, steps=6, guidance=3.0)
    assert reader.score(captions, pictures)["accuracy"] >= LEAST_ACCURACY
    assert reader.score(captions[1:] + captions[:1], pictures)["accuracy"] < 0.5
