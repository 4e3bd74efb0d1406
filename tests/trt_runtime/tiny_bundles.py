"""Bundles and pipelines of tiny random transformers; graphs only as far as PyTorch needs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from plans.bundle import Bundle
from plans.plan import Plan, dense_plan
from tests import tiny
from trt_runtime.live import live_bundle
from trt_runtime.torch_engine import TorchEngine
from trt_runtime.transformer import TRANSFORMERS, ArrowheadTransformer

STEPS = 6
SIGMAS = [1 - i / STEPS for i in range(STEPS)]


def tiny_model(kind: str) -> Any:
    return tiny.tiny_sd3() if kind == "sd3" else tiny.tiny_flux()


def bundle_of(model: Any, plan: Plan, batch: int) -> Bundle:
    """What an export would say of I/O, with file names but without files."""
    bundle = live_bundle(plan, model, batch)
    graphs = tuple(replace(graph, file=f"bucket_{graph.bucket}.onnx") for graph in bundle.graphs)
    dense = replace(bundle.dense or graphs[0], file="dense.onnx")
    return replace(
        bundle, graphs=graphs, dense=dense, weights_file="weights.bin", weights_sha256="0" * 64
    )


def torch_proxy(
    model: Any, plan: Plan, batch: int, *, dense: bool = False, poison: bool = True
) -> ArrowheadTransformer:
    bundle = bundle_of(model, plan, batch)
    graphs = [bundle.dense] if dense else bundle.graphs
    engines = {i: TorchEngine(model, plan, graph) for i, graph in enumerate(graphs)}
    kind = TRANSFORMERS[bundle.model["architecture"]]
    return kind(bundle, dense_plan(plan) if dense else plan, engines, poison=poison)


def tiny_pipeline(model: Any, scheduler: Any = None) -> Any:
    """A pipeline without text encoders or VAE: prompt embeddings in, latents out."""
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if isinstance(model, SD3Transformer2DModel):
        pipe = StableDiffusion3Pipeline(
            model, scheduler, **empty, text_encoder_3=None, tokenizer_3=None
        )
    else:
        pipe = FluxPipeline(scheduler=scheduler, transformer=model, **empty)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, *, seed: int = 0, steps: int = STEPS, pictures: int = 1, **more: Any) -> Tensor:
    """Latents of one pipeline call on random prompt embeddings."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    text = normal(pictures, tiny.TEXT_TOKENS, tiny.JOINT_DIM)
    arguments = {
        "prompt_embeds": text,
        "pooled_prompt_embeds": normal(pictures, tiny.POOLED_DIM),
        "height": tiny.HEIGHT,
        "width": tiny.WIDTH,
        "num_inference_steps": steps,
        "sigmas": [1 - i / steps for i in range(steps)],
        "guidance_scale": 4.0,
        "generator": generator,
        "output_type": "latent",
    }
    if isinstance(pipe, StableDiffusion3Pipeline):
        arguments["negative_prompt_embeds"] = torch.zeros_like(text)
        arguments["negative_pooled_prompt_embeds"] = torch.zeros(pictures, tiny.POOLED_DIM)
    return pipe(**(arguments | more)).images


def caption_lengths(captions: list[str], images: list[Any]) -> dict[str, float]:
    """An accuracy callable that looks at no picture."""
    assert len(captions) == len(images)
    return {"letters": sum(map(len, captions)) / len(captions)}
