"""Is this transformer one that the plan's attention can be put into from outside?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from plans.errors import ArrowheadError
from plans.models import AttentionModule

# Processors whose arithmetic HeadwiseProcessor reproduces; replacing another would change results.
_STOCK = {
    "Attention": ("JointAttnProcessor2_0", "XFormersJointAttnProcessor"),
    "FluxAttention": ("FluxAttnProcessor",),
}
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def check_stock(transformer: nn.Module, modules: Sequence[AttentionModule]) -> dict[str, Any]:
    """Return the transformer's attention modules by name.

    Raises ArrowheadError, naming the module, where the transformer is not a stock SD3 or FLUX one:
    attention modules the plan does not list, fused projections, LoRA layers that are not fused,
    IP-adapters, quantised projections.
    """
    _check_adapters(transformer)
    by_name = {module.name: module for module in modules}
    found = {name: m for name, m in transformer.named_modules() if _is_attention(m)}
    if set(found) != set(by_name):
        raise ArrowheadError(
            "attention modules of the transformer",
            got=f"{sorted(set(found) - set(by_name))} that the plan does not list, and none of "
            f"{sorted(set(by_name) - set(found))}",
            expected="exactly the plan's modules",
            fix="use the transformer the plan was made for",
        )
    for name, attn in found.items():
        _check_stock(by_name[name], attn)
    return found


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "to_q") and callable(getattr(module, "set_processor", None))


def _check_stock(module: AttentionModule, attn: Any) -> None:
    kind, processor = type(attn).__name__, type(attn.processor).__name__
    stock = _STOCK.get(kind, ())
    projections = {name: getattr(attn, name, None) for name in _PROJECTIONS}
    odd = [n for n, x in projections.items() if x is not None and type(x) is not nn.Linear]
    fused = getattr(attn, "fused_projections", False)
    head_dim = attn.to_q.weight.shape[0] // attn.heads
    normed = getattr(getattr(attn, "norm_q", None), "weight", None)
    other_model = "use the transformer the plan was made for"
    checks = (
        (not stock, kind, f"one of {sorted(_STOCK)}", "use an SD3 or FLUX model of diffusers"),
        (
            fused,
            "fused QKV projections",
            "separate to_q, to_k, to_v",
            "call transformer.unfuse_qkv_projections() first",
        ),
        (
            processor not in (*stock, "HeadwiseProcessor"),
            f"the processor {processor}",
            f"one of {list(stock)}",
            "unload IP-adapters and other patches, or load the transformer anew",
        ),
        (
            bool(odd),
            f"{', '.join(odd)} of type {', '.join(type(projections[n]).__name__ for n in odd)}",
            "torch.nn.Linear",
            "load the transformer without quantisation",
        ),
        (
            (attn.heads, head_dim) != (module.heads, module.head_dim),
            f"{attn.heads} heads of {head_dim}",
            f"{module.heads} heads of {module.head_dim}",
            other_model,
        ),
        (
            normed is not None and normed.numel() != head_dim,
            "norm_q over all heads",
            "a norm over one head",
            "models that normalise across heads are not supported",
        ),
    )
    for wrong, got, expected, fix in checks:
        if wrong:
            subject = f"attention module {module.name}"
            raise ArrowheadError(subject, got=got, expected=expected, fix=fix)


def _check_adapters(transformer: nn.Module) -> None:
    lora = [n for n, m in transformer.named_modules() if hasattr(m, "base_layer")]
    if lora:
        raise ArrowheadError(
            "transformer weights",
            got=f"LoRA layers that are not fused ({lora[0]} and {len(lora) - 1} more)",
            expected="plain weights",
            fix="call pipe.fuse_lora() and then pipe.unload_lora_weights()",
        )
    names = ("encoder_hid_proj", "image_proj")  # FLUX's and SD3's
    if any(getattr(transformer, name, None) is not None for name in names):
        raise ArrowheadError(
            "transformer",
            got="an IP-adapter",
            expected="text conditioning only",
            fix="call pipe.unload_ip_adapter() first",
        )
