"""Whole pipelines that draw a picture in some ten milliseconds, exported, for tests of serving.

Random transformers and VAE; the text encoders are tiny-sd3's, so that prompts are real ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModel

from exporter import export_bundle
from plans.plan import Plan, check_plan
from tests import tiny
from tests.testbed.models import CLIP_LENGTH, T5_LENGTH, TESTBED

STEPS = 8
WIDTHS = {"joint_attention_dim": 192, "pooled_projection_dim": 192}  # those of the encoders
# Pictures of one call: two show how requests share one; SD3 has two rows a picture, FLUX one.
PICTURES = {"sd3": 2, "flux": 2}


def make_bundle(kind: str, root: Path, *, seed: int = 0) -> Path:
    """Save a pipeline under root/model and export it to root/bundle; give that.

    seed: of the plan; bundles that differ only in it are versions of one model.
    """
    pipe = _sd3() if kind == "sd3" else _flux()
    pipe.save_pretrained(root / "model")
    plan = _plan(pipe.transformer, kind, seed)
    rows = PICTURES[kind] * (2 if kind == "sd3" else 1)
    export_bundle(
        pipe.transformer, plan, root / "bundle", dtype="fp32", batch=rows, dense=False,
        source=str(root / "model"),
    )  # fmt: skip
    return root / "bundle"


def _parts() -> Any:
    return StableDiffusion3Pipeline.from_pretrained(
        TESTBED / "tiny-sd3", transformer=None, torch_dtype=torch.float32
    )


def _sd3() -> StableDiffusion3Pipeline:
    parts = _parts()
    transformer = tiny.tiny_sd3(num_layers=2, dual_attention_layers=(), **WIDTHS)
    given = dict(parts.components) | {"transformer": transformer, "vae": tiny.tiny_vae()}
    return StableDiffusion3Pipeline(**{**given, "scheduler": FlowMatchEulerDiscreteScheduler()})


def _flux() -> FluxPipeline:
    parts = _parts()
    torch.manual_seed(1)
    clip = CLIPTextModel(parts.text_encoder.config).eval()
    widths = WIDTHS | {"pooled_projection_dim": clip.config.hidden_size}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny.tiny_vae(),
        text_encoder=clip,
        tokenizer=parts.tokenizer,
        text_encoder_2=parts.text_encoder_3,
        tokenizer_2=parts.tokenizer_3,
        transformer=tiny.tiny_flux(num_layers=1, num_single_layers=1, **widths),
    )


def _plan(transformer: Any, kind: str, seed: int) -> Plan:
    text = T5_LENGTH + (CLIP_LENGTH if kind == "sd3" else 0)
    spec = tiny.spec_of(transformer, text_tokens=text)
    plan = tiny.random_plan(transformer, seed=seed, buckets=3, steps=STEPS)
    scheduler = FlowMatchEulerDiscreteScheduler()
    # SD3's pipeline takes the scheduler's sigmas, FLUX's brings its own, which the plan has.
    if kind == "sd3":
        scheduler.set_timesteps(STEPS)
        sigmas = tuple(scheduler.sigmas.tolist()[:STEPS])
        plan = replace(plan, sampler=replace(plan.sampler, sigmas=sigmas))
    plan = replace(plan, text_tokens=text, modules=spec.modules)
    check_plan(plan, spec)
    return plan
