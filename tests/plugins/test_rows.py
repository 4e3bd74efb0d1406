"""Norm and rotation of heads on a GPU, against fp64, and as ONNX Runtime's CUDA operators."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plans.errors import ArrowheadError
from plans.ops import rotary_embedding
from plugins.torch import library, rows
from tests.plugins.conftest import NO_LIBRARY

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU: the kernels are not run", allow_module_level=True)
if library.find_library() is None:
    pytest.skip(NO_LIBRARY, allow_module_level=True)

EPSILON = 1e-6
Operation = Callable[[Tensor], Tensor]
shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 300), st.integers(1, 25),
    st.sampled_from([8, 16, 32, 64, 128, 256]),
)  # fmt: skip
dtypes = st.sampled_from([torch.float16, torch.bfloat16])


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    other = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos[:, None] + other * sin[:, None]


def check(x: Tensor, ours: Callable[..., Tensor], plain: Operation, truth: Operation) -> None:
    """Err at most twice what PyTorch does; write all of the output and nothing around it."""
    whole = torch.full((x.numel() + 64,), torch.nan, dtype=x.dtype, device="cuda")
    out = whole[32:-32].view(x.shape)
    ours(x, out=out)
    want = truth(x.double())
    error = (out.double() - want).abs().max()
    assert error <= 2 * (plain(x).double() - want).abs().max() + 1e-12
    assert whole[:32].isnan().all() and whole[-32:].isnan().all()


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=dtypes, seed=st.integers(0, 2**31))
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = 3 * normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)

    def truth(wide: Tensor) -> Tensor:
        return F.rms_norm(wide, shape[-1:], weight.double(), EPSILON)

    check(
        x,
        lambda x, out: rows.rms_norm(x, weight, EPSILON, out),
        lambda x: F.rms_norm(x, shape[-1:], weight, EPSILON),
        truth,
    )


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=dtypes, seed=st.integers(0, 2**31))
def test_rotary(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, angles = normal(*shape, dtype=dtype), 9 * normal(shape[1], shape[-1])
    cos, sin = angles.cos(), angles.sin()
    check(
        x,
        lambda x, out: rows.rotary(x, cos, sin, out),
        lambda x: rotary_embedding(x, cos, sin),
        lambda wide: turned(wide, cos.double(), sin.double()),
    )


def test_true_sizes() -> None:
    """FLUX at 2048 x 2048."""
    x, weight = normal(1, 16896, 24, 128, dtype=torch.bfloat16), normal(128, dtype=torch.bfloat16)
    angles = normal(16896, 128)
    want = F.rms_norm(x.float(), (128,), weight.float(), EPSILON)
    torch.testing.assert_close(rows.rms_norm(x, weight, EPSILON).float(), want, rtol=5e-3, atol=0)
    want = turned(x.double(), angles.cos().double(), angles.sin().double())
    got = rows.rotary(x, angles.cos(), angles.sin()).double()
    torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-6)


def test_refusals() -> None:
    x, weight = normal(1, 3, 2, 24, dtype=torch.float16), normal(24, dtype=torch.float16)
    with pytest.raises(ArrowheadError, match=r"rows of heads \| got invalid argument"):
        rows.rms_norm(x, weight, EPSILON)
    x = normal(2 * 64 + 1, dtype=torch.float16)[1:].view(1, 1, 2, 64)
    with pytest.raises(ArrowheadError, match="misaligned"):
        rows.rms_norm(x, normal(64, dtype=torch.float16), EPSILON)
    for x in (normal(1, 2, 1, 64), normal(1, 2, 64, 3, dtype=torch.float16).transpose(2, 3)):
        with pytest.raises(ArrowheadError, match="rows that the kernel does not take"):
            rows.rms_norm(x, normal(64, dtype=torch.float16), EPSILON)
    params = rows.RowParams(0, -1, 1, 1, 64)
    assert library.load_library().arrowhead_rotary(ctypes.byref(params), None, None, None) == 1
