"""Full attention on live q, k, v, and how far one output is from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from plans.models import AttentionModule

# On Hopper cuDNN's takes little more than half of the time of what PyTorch would choose.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    backends: Sequence[SDPBackend] = BACKENDS,
) -> Tensor:
    """Attend [B, rows, H, D] to [B, keys, H, D]; fp32 on a CPU, in any case accumulated in it."""
    qt, kt, vt = (_exact(x).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cuda":
        with sdpa_kernel(list(backends), set_priority=True):
            out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask)
    else:
        out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask)
    return out.transpose(1, 2).to(q.dtype)


def _exact(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "cpu" else x


class Moments(NamedTuple):
    """Weighted means over rows and items of full outputs and what candidates miss, in fp32.

    mean, spread: [H], of the full output and of its squared distance from that mean; squared:
    [C, H], of each candidate's squared distance from it.
    """

    mean: Tensor
    spread: Tensor
    squared: Tensor

    def errors(self) -> Tensor:
        """Return the relative squared errors mean (O_m - O)^2 / mean (O - mean O)^2, [C, H].

        A constant output that is met exactly has error 0; one that is missed, or not finite, has
        error infinity.
        """
        errors = torch.where(self.squared == 0, self.squared, self.squared / self.spread)
        return torch.nan_to_num(errors, nan=torch.inf)


def moments(candidates: Sequence[Tensor], full: Tensor, weights: Tensor | None = None) -> Moments:
    """Compare candidates, some [C, B, rows, H, D], with the full output [B, rows, H, D].

    weights: [rows], how many rows each stands for.
    """
    full = full.float()
    share = torch.ones(full.shape[1], device=full.device) if weights is None else weights
    share = share / (share.sum() * full.shape[0] * full.shape[3])
    mean = torch.einsum("brhd,r->h", full, share)
    return Moments(
        mean,
        share @ _squares(full - mean[:, None]),
        # One pass: the difference is fp32 as it is written.
        torch.cat([share @ _squares(some - full) for some in candidates]),
    )


def latest(steps: Sequence[Mapping[str, Moments]], step: int, module: str) -> Moments:
    """Return a module's moments at a step, where it was left out those of its last run.

    There it repeats that run's output, so nothing that stands for it errs.
    """
    found = steps[step].get(module)
    if found is None:
        before = latest(steps, step - 1, module)
        found = before._replace(squared=torch.zeros_like(before.squared))
    return found


def _squares(x: Tensor) -> Tensor:
    """Sum squares over rows of the batch and items: [.., B, rows, H, D] -> [.., rows, H]."""
    return torch.linalg.vector_norm(x, dim=(-4, -1)).square_()


def relative_squared_errors(
    approximate: Tensor, full: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return per head how far an output is from the full one, both [B, rows, H, D]: [H] in fp32."""
    return moments([approximate[None]], full, weights).errors()[0]


def counted(module: AttentionModule, output: Tensor) -> Tensor:
    """Leave out the rows of text that the module discards: [B, S, h, D] or [B, V, h, D]."""
    if module.text_output:
        return output
    return output.narrow(1, module.layout.image_offset, module.layout.image_tokens)
