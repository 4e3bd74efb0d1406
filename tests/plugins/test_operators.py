"""What the operators give to the kernel and what to SDPA, seen without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plans import sdpa
from plugins.torch import attention

LAYOUT = (0.125, 5, False, 16)  # scale, text tokens, text first, block
WINDOWS, SOURCE = [-1, 0, 1], [0, 3, 2]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(attention, "launch", lambda *_, **options: made.append(options))
    return made


def tensors(dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    """q, k, v [B, S, h, D] and a cache [B, S, 1, D]."""
    torch.manual_seed(0)
    return [torch.randn(2, 53, heads, head_dim).to(dtype) for heads in (3, 3, 3, 1)]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_kernels(
    dtype: torch.dtype, head_dim: int, launches: list[dict[str, Any]]
) -> None:
    q, k, v, cache = tensors(dtype, head_dim)
    assert attention.arrow_attention(q, k, v, *LAYOUT, WINDOWS).shape == q.shape
    attention.cached_head(q, k, v, cache.float(), *LAYOUT, WINDOWS, SOURCE)
    assert len(launches) == 2
    assert launches[1]["cache"].dtype == dtype


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 64), (torch.float16, 32)])
def test_what_the_kernel_does_not_take_is_sdpas(
    dtype: torch.dtype, head_dim: int, launches: list[dict[str, Any]]
) -> None:
    q, k, v, cache = tensors(dtype, head_dim)
    got = attention.arrow_attention(q, k, v, *LAYOUT, WINDOWS)
    assert torch.equal(got, sdpa.arrow_attention(q, k, v, *LAYOUT, WINDOWS))
    got = attention.cached_head(q, k, v, cache, *LAYOUT, WINDOWS, SOURCE)
    assert torch.equal(got, sdpa.cached_head(q, k, v, cache, *LAYOUT, WINDOWS, SOURCE))
    assert not launches


def test_tensors_that_differ_never_reach_the_kernel(launches: list[dict[str, Any]]) -> None:
    q, k, v, cache = tensors(torch.bfloat16, 64)
    for other in (k.float(), k[:, :50], k[:, :, :2], k[:1, :, :, :32]):
        with pytest.raises((RuntimeError, IndexError)):
            attention.arrow_attention(q, other, v, *LAYOUT, WINDOWS)
    for other in (cache[:, :50], cache[:1], cache[..., :32]):
        with pytest.raises(RuntimeError):
            attention.cached_head(q, k, v, other, *LAYOUT, WINDOWS, SOURCE)
    assert not launches
