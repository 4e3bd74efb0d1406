"""Bundles at the true shapes of 2K pictures: the real widths, few blocks, random weights.

    python -m tests.trt_runtime.real_shapes flux bf16 build/flux-2k
    python -m tests.trt_runtime.tensorrt_offline arrowhead build build/flux-2k --backend tensorrt

Two buckets: all full, and one with every mode and whole modules from the cache. Takes some
gigabytes of memory and disk.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from exporter import export_bundle
from plans.models import config_fingerprint, model_spec
from plans.plan import Bucket, ModelRef, Plan, Sampler, check_plan

SIDE, STEPS = 2048, 28
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# FLUX.1-dev and SD3-medium (stabilityai/stable-diffusion-3-medium), but for the depth.
FLUX = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 2,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "out_channels": 16,
    "pos_embed_max_size": 192,
}  # fmt: skip
TEXT_TOKENS = {"flux": 512, "sd3": 333}


def model_of(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a model in fp32 first would take twice the memory
    try:
        model = FluxTransformer2DModel(**FLUX) if kind == "flux" else SD3Transformer2DModel(**SD3)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def plan_of(model: Any, kind: str) -> Plan:
    """Bucket 1: a third of the heads full, a third arrows, a third cached; the first module all."""
    config = {**model.config, "_class_name": type(model).__name__}
    spec = model_spec(
        config,
        height=SIDE,
        width=SIDE,
        vae_scale_factor=8,
        text_tokens=TEXT_TOKENS[kind],
        block=128,
    )
    modes = {module.name: ((-1, 4, -2) * module.heads)[: module.heads] for module in spec.modules}
    modes[spec.modules[0].name] = (-2,) * spec.modules[0].heads
    full = {module.name: (-1,) * module.heads for module in spec.modules}
    plan = Plan(
        model=ModelRef(spec.architecture, config_fingerprint(spec.config)),
        height=SIDE,
        width=SIDE,
        vae_scale_factor=8,
        text_tokens=TEXT_TOKENS[kind],
        block=128,
        modules=spec.modules,
        sampler=Sampler(
            "FlowMatchEulerDiscreteScheduler",
            STEPS,
            tuple(1 - i / STEPS for i in range(STEPS)),
            cfg=kind == "sd3",
            guidance_scale=3.5,
        ),
        buckets=(Bucket(full), Bucket(modes)),
        schedule=(0, 1) * (STEPS // 2),
    )
    check_plan(plan, spec)
    return plan


def main() -> int:
    """Export one bundle."""
    if len(sys.argv) != 4 or sys.argv[1] not in TEXT_TOKENS or sys.argv[2] not in DTYPES:
        print("usage: python -m tests.trt_runtime.real_shapes flux|sd3 fp16|bf16 BUNDLE")
        return 2
    kind, dtype, folder = sys.argv[1:]
    model = model_of(kind, DTYPES[dtype])
    batch = 2 if kind == "sd3" else 1
    export_bundle(model, plan_of(model, kind), Path(folder), dtype=dtype, batch=batch, dense=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
