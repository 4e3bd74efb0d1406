"""Tiny random pipelines without text encoders, embeddings for them, and a search on them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)

from plans.plan import Plan
from plans.search import search_plan
from tests.tiny import BLOCK, HEIGHT, JOINT_DIM, POOLED_DIM, TEXT_TOKENS, WIDTH
from tests.tiny import tiny_flux as flux_transformer
from tests.tiny import tiny_sd3 as sd3_transformer

STEPS = 5


def vae(latent_channels: int) -> AutoencoderKL:
    channels = (4, 4, 4, 4)  # four levels: one latent pixel is eight pixels
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        latent_channels=latent_channels,
        norm_num_groups=2,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )


def sd3_pipeline(scheduler: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
    pipe = StableDiffusion3Pipeline(
        sd3_transformer(), scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0), vae(4),
        None, None, None, None, None, None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    prompts = {
        name: torch.randn(2, *shape, generator=generator)
        for prefix in ("", "negative_")
        for name, shape in (
            (f"{prefix}prompt_embeds", (TEXT_TOKENS, JOINT_DIM)),
            (
                "pooled_prompt_embeds" if not prefix else "negative_pooled_prompt_embeds",
                (POOLED_DIM,),
            ),
        )
    }
    return pipe, prompts


def flux_pipeline() -> tuple[Any, dict[str, torch.Tensor]]:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae(4), None, None, None, None, flux_transformer())
    generator = torch.Generator().manual_seed(1)
    return pipe, {
        "prompt_embeds": torch.randn(2, TEXT_TOKENS, JOINT_DIM, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, POOLED_DIM, generator=generator),
    }


def search(pipe: Any, prompts: Any, **changes: Any) -> Plan:
    arguments: dict[str, Any] = dict(
        steps=STEPS,
        height=HEIGHT,
        width=WIDTH,
        delta=0.3,
        block=BLOCK,
        divisors=(4, 8),
        guidance_scale=4.0,
        max_buckets=3,
    )
    return search_plan(pipe, prompts, **{**arguments, **changes})
