"""Bundles without files: what an export of a plan would say, for backends that need no graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from plans.bundle import Bundle, CacheSpec, GraphSpec, TensorSpec
from plans.errors import ArrowheadError
from plans.models import SD3, ModelSpec, model_spec
from plans.plan import CacheGroup, Plan, cache_flow, check_plan
from trt_runtime.engine import CACHE_IN, CACHE_OUT, DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def rows_per_picture(plan: Plan) -> int:
    """Rows of a transformer call that one picture takes: two where it has a negative row."""
    return 2 if plan.sampler.cfg and plan.model.architecture == SD3 else 1


def spec_of(
    plan: Plan, kind: str, config: Mapping[str, Any], vae_scale_factor: int | None = None
) -> ModelSpec:
    """Describe a transformer of class `kind` at the plan's picture size and text length."""
    return model_spec(
        {**config, "_class_name": kind},
        height=plan.height,
        width=plan.width,
        vae_scale_factor=vae_scale_factor or plan.vae_scale_factor,
        text_tokens=plan.text_tokens,
        block=plan.block,
    )


def live_bundle(plan: Plan, transformer: Any, batch: int | None = None) -> Bundle:
    """Describe the bundle of a plan and a diffusers transformer that was not exported.

    batch: rows of one transformer call; None for those of one picture. Raises ArrowheadError for a
    transformer that the plan was not made for, and for a dtype that no bundle has.
    """
    check_plan(plan, spec_of(plan, type(transformer).__name__, transformer.config))
    rows = rows_per_picture(plan) if batch is None else batch
    if rows < 1 or rows % rows_per_picture(plan):
        raise ArrowheadError(
            "batch",
            got=rows,
            expected=f"a multiple of {rows_per_picture(plan)} rows",
            fix="count two rows a picture under classifier-free guidance, else one",
        )
    dtype = _NAMES[_float_dtype(transformer)]
    inputs = step_inputs(plan, transformer.config, rows, dtype)
    sample = TensorSpec("sample", dtype, inputs[0].shape)
    flow = cache_flow(plan)

    def caches(groups: tuple[CacheGroup, ...], prefix: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(prefix + group.name, dtype, cache_shape(plan, group, rows))
            for group in groups
        )

    return Bundle(
        plan_sha256=plan.sha256,
        model={"architecture": plan.model.architecture},
        config=dict(transformer.config),
        dtype=dtype,
        batch=rows,
        weights_file="",
        weights_sha256="",
        cache_groups=tuple(
            CacheSpec(group.name, group.heads, cache_shape(plan, group, rows))
            for group in flow.groups
        ),
        graphs=tuple(
            GraphSpec(
                "",
                b,
                (*inputs, *caches(flow.reads(b), CACHE_IN)),
                (sample, *caches(flow.writes(b), CACHE_OUT)),
                (),
            )
            for b in range(len(plan.buckets))
        ),
        dense=GraphSpec("", None, inputs, (sample,), ()),
        versions={},
    )


def step_inputs(
    plan: Plan, config: Mapping[str, Any], rows: int, dtype: str
) -> tuple[TensorSpec, ...]:
    """Give the inputs with which diffusers' pipelines call the transformer, latents first."""
    height, width = plan.height // plan.vae_scale_factor, plan.width // plan.vae_scale_factor
    channels = config["in_channels"]
    shape: tuple[int, ...] = (rows, (height // 2) * (width // 2), channels)
    if plan.model.architecture == SD3:
        shape = (rows, channels, height, width)
    inputs = [
        TensorSpec("hidden_states", dtype, shape),
        TensorSpec(
            "encoder_hidden_states", dtype, (rows, plan.text_tokens, config["joint_attention_dim"])
        ),
        TensorSpec("pooled_projections", dtype, (rows, config["pooled_projection_dim"])),
        # SD3's pipeline passes fp32, FLUX's the latents' dtype.
        TensorSpec("timestep", "float32" if plan.model.architecture == SD3 else dtype, (rows,)),
    ]
    if config.get("guidance_embeds"):
        inputs.append(TensorSpec("guidance", "float32", (rows,)))
    return tuple(inputs)


def cache_shape(plan: Plan, group: CacheGroup, rows: int) -> tuple[int, ...]:
    """[B, S, Hg, D] of one cache group."""
    module = next(module for module in plan.modules if module.name == group.module)
    return (rows, module.layout.seq_len, len(group.heads), module.head_dim)


def _float_dtype(transformer: nn.Module) -> torch.dtype:
    dtype = next(transformer.parameters()).dtype
    if dtype not in _NAMES or not dtype.is_floating_point:
        raise ArrowheadError(
            "transformer dtype",
            got=dtype,
            expected="float32, float16 or bfloat16",
            fix="load the pipeline with torch_dtype=torch.bfloat16",
        )
    return dtype
