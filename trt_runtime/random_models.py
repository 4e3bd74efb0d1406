"""Real architectures with random weights, made on the device, and inputs for one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plans.architectures import Architecture
from plans.models import SD3
from plans.plan import Plan
from trt_runtime.torch_engine import position_ids

_STD = 0.02


def random_transformer(
    architecture: Architecture, *, device: str, dtype: torch.dtype, seed: int = 0
) -> Any:
    """Make the diffusers transformer; nothing of it passes through the host's memory.

    Matrices and biases are normal with deviation 0.02, norms are 1: outputs stay finite at any
    depth. Random weights have no structure: good for speed and memory, not for quality.
    """
    import diffusers

    config = {k: v for k, v in architecture.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, architecture.config["_class_name"])(**config)
    model = nn.Module.to(model, dtype)  # diffusers' own warns of modules to keep in fp32
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name and name.endswith("weight") and tensor.ndim == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, _STD, generator=generator)
    return model


def random_inputs(
    architecture: Architecture, plan: Plan, *, device: str, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Make one step's inputs, by keyword, as the pipeline passes them for one picture."""
    config, rows = architecture.config, architecture.rows
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    inputs = {
        "encoder_hidden_states": normal(
            rows, architecture.text_tokens, config["joint_attention_dim"]
        ),
        "pooled_projections": normal(rows, config["pooled_projection_dim"]),
    }
    if config["_class_name"] == SD3:
        scale = architecture.vae_scale_factor
        size = (plan.height // scale, plan.width // scale)
        inputs["hidden_states"] = normal(rows, config["in_channels"], *size)
        inputs["timestep"] = torch.full((rows,), 500.0, device=device)
        return inputs
    tokens = plan.modules[0].layout.image_tokens
    inputs["hidden_states"] = normal(rows, tokens, config["in_channels"])
    inputs["timestep"] = torch.full((rows,), 0.5, device=device, dtype=dtype)
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.full((rows,), architecture.guidance_scale, device=device)
    return inputs | position_ids(plan, device)
