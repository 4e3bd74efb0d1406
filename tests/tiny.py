"""Tiny random transformers, inputs and plans, for tests of processors, exporter and runtime."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from plans.models import ModelSpec, config_fingerprint, model_spec
from plans.plan import Bucket, ModelRef, Plan, Sampler, check_plan

HEIGHT, WIDTH, TEXT_TOKENS, BLOCK = 64, 96, 5, 5  # 24 image tokens: the last block is short
HEADS, HEAD_DIM, JOINT_DIM, POOLED_DIM = 4, 8, 12, 10


def tiny_sd3(**config: Any) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    defaults = dict(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=JOINT_DIM,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=POOLED_DIM,
        out_channels=4,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return _spread(SD3Transformer2DModel(**{**defaults, **config}))


def tiny_flux(**config: Any) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    defaults = dict(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=JOINT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return _spread(FluxTransformer2DModel(**{**defaults, **config}))


def _spread(model: Any) -> Any:
    """Make norms' weights distinct and attention peaky, so that a mistake in a head shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm_" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(1 + torch.rand_like(parameter))
    return model.eval()


def spec_of(model: Any, text_tokens: int = TEXT_TOKENS, block: int = BLOCK) -> ModelSpec:
    config = {**model.config, "_class_name": type(model).__name__}
    return model_spec(
        config,
        height=HEIGHT,
        width=WIDTH,
        vae_scale_factor=8,
        text_tokens=text_tokens,
        block=block,
    )


def inputs_of(model: Any, seed: int = 0, batch: int = 2) -> dict[str, Tensor]:
    """The transformer's inputs at one step, by keyword; FLUX with img_ids and txt_ids."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = {
        "encoder_hidden_states": normal(batch, TEXT_TOKENS, JOINT_DIM),
        "pooled_projections": normal(batch, POOLED_DIM),
        "timestep": torch.full((batch,), 900.0 - 50 * seed),
    }
    if isinstance(model, SD3Transformer2DModel):
        inputs["hidden_states"] = normal(batch, 4, HEIGHT // 8, WIDTH // 8)
        return inputs
    rows, columns = HEIGHT // 16, WIDTH // 16
    grid = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1
    ).reshape(-1, 2)
    inputs["hidden_states"] = normal(batch, rows * columns, 16)
    inputs["timestep"] = (inputs["timestep"] / 1000).to(dtype)
    inputs["img_ids"] = torch.cat([torch.zeros(rows * columns, 1), grid], 1).to(dtype)
    inputs["txt_ids"] = torch.zeros(TEXT_TOKENS, 3, dtype=dtype)
    if model.config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


def random_plan(model: Any, seed: int = 0, buckets: int = 3, steps: int = 6) -> Plan:
    """A legal plan with every mode in it; bucket 1 takes a whole module from the cache."""
    spec = spec_of(model)
    rng = random.Random(seed)
    full = Bucket({module.name: (-1,) * module.heads for module in spec.modules})
    others = []
    for _ in range(buckets - 1):
        modes = {
            module.name: tuple(
                rng.choice((-2, -2, -1, 0, 1, module.layout.blocks - 1))
                for _ in range(module.heads)
            )
            for module in spec.modules
        }
        others.append(Bucket(modes))
    first = spec.modules[0]
    others[0].modes[first.name] = (-2,) * first.heads
    others[-1].modes[spec.modules[-1].name] = (-1, 0, 1, -1)
    schedule = (0, *range(1, buckets), *(rng.randrange(buckets) for _ in range(steps - buckets)))
    plan = Plan(
        model=ModelRef(spec.architecture, config_fingerprint(spec.config)),
        height=HEIGHT,
        width=WIDTH,
        vae_scale_factor=8,
        text_tokens=TEXT_TOKENS,
        block=BLOCK,
        modules=spec.modules,
        sampler=Sampler(
            "FlowMatchEulerDiscreteScheduler",
            steps,
            tuple(1 - i / steps for i in range(steps)),
            cfg=spec.architecture.startswith("SD3"),
            guidance_scale=4.0,
        ),
        buckets=(full, *others),
        schedule=schedule,
    )
    check_plan(plan, spec)
    return plan


def with_first_arrows(plan: Plan) -> Plan:
    """The plan with arrow heads in step 0's bucket, in the first module; no bucket is all full."""
    first = plan.buckets[0].modes
    name = plan.modules[0].name
    bucket = Bucket({**first, name: (0, 1) + first[name][2:]})
    return replace(plan, buckets=(bucket, *plan.buckets[1:]))


def with_modes(plan: Plan, modes: dict[str, tuple[int, ...]], bucket: int = 1) -> Plan:
    """The plan with a bucket's modes replaced for some modules."""
    buckets = list(plan.buckets)
    buckets[bucket] = Bucket({**buckets[bucket].modes, **modes})
    return replace(plan, buckets=tuple(buckets))


def tiny_vae() -> AutoencoderKL:
    """Decode a latent pixel to eight pixels, four latent channels."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
