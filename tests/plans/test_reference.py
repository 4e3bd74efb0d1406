from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plans.errors import ArrowheadError
from plans.reference import arrow_attention, arrow_mask, cached_head
from plans.tiles import TokenLayout, kept_pairs


def naive_mask(layout: TokenLayout, half_window: int) -> Tensor:
    """The definition, one pair at a time."""
    mask = torch.zeros(layout.seq_len, layout.seq_len, dtype=torch.bool)
    for query in range(layout.seq_len):
        for key in range(layout.seq_len):
            a, b = query - layout.image_offset, key - layout.image_offset
            both_image = 0 <= a < layout.image_tokens and 0 <= b < layout.image_tokens
            near = abs(a // layout.block - b // layout.block) <= half_window
            mask[query, key] = not both_image or half_window == -1 or near
    return mask


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: list[Tensor]) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.empty_like(q)
    for head, mask in enumerate(masks):
        scores = torch.einsum("bqd,bkd->bqk", q[:, :, head], k[:, :, head]) * scale
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        out[:, :, head] = weights @ v[:, :, head]
    return out


layouts = st.builds(
    TokenLayout,
    image_tokens=st.integers(1, 40),
    text_tokens=st.one_of(st.just(0), st.integers(0, 9)),
    text_first=st.booleans(),
    block=st.one_of(st.integers(1, 12), st.just(128)),
)
half_windows = st.lists(st.integers(-1, 6), min_size=1, max_size=5)


def qkv(layout: TokenLayout, heads: int, batch: int = 2, head_dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(layout.seq_len * 31 + heads)
    shape = (3, batch, layout.seq_len, heads, head_dim)
    return list(2 * torch.randn(shape, generator=generator))


def arguments(layout: TokenLayout) -> dict:
    return dict(
        scale=0.4,
        text_tokens=layout.text_tokens,
        text_first=layout.text_first,
        block=layout.block,
    )


@settings(max_examples=40, deadline=None)
@given(layouts, st.integers(0, 8))
def test_mask_is_the_definition(layout: TokenLayout, half_window: int) -> None:
    mask = arrow_mask(layout, half_window)
    assert torch.equal(mask, naive_mask(layout, half_window))
    assert int(mask.sum()) == kept_pairs(layout, half_window)


@settings(max_examples=60, deadline=None)
@given(layouts, half_windows)
def test_attention_equals_naive_float64(layout: TokenLayout, windows: list[int]) -> None:
    q, k, v = qkv(layout, len(windows))
    got = arrow_attention(q, k, v, half_windows=windows, **arguments(layout))
    want = naive_attention(q, k, v, 0.4, [naive_mask(layout, w) for w in windows])
    assert got.is_contiguous() and got.dtype == torch.float32
    # Logits reach 30 and values 6: one fp32 rounding of the one, times the other.
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=30 * 6 * 2**-23)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    layout = TokenLayout(20, 3, True, 4)
    q, k, v = (x.to(dtype) for x in qkv(layout, 3))
    got = arrow_attention(q, k, v, half_windows=[-1, 0, 2], **arguments(layout))
    want = arrow_attention(
        q.float(), k.float(), v.float(), half_windows=[-1, 0, 2], **arguments(layout)
    )
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))


@settings(max_examples=40, deadline=None)
@given(layouts, half_windows, st.integers(1, 4), st.randoms(use_true_random=False))
def test_cached_head_picks_by_source(layout, windows, cached, random) -> None:
    q, k, v = qkv(layout, len(windows))
    cache = torch.randn(2, layout.seq_len, cached, 8)
    source = [random.randrange(len(windows) + cached) for _ in range(6)]
    got = cached_head(q, k, v, cache, half_windows=windows, source=source, **arguments(layout))
    computed = arrow_attention(q, k, v, half_windows=windows, **arguments(layout))
    for head, index in enumerate(source):
        own = index < len(windows)
        want = computed[:, :, index] if own else cache[:, :, index - len(windows)]
        assert torch.equal(got[:, :, head], want)


def test_wrong_half_windows() -> None:
    layout = TokenLayout(8, 2, False, 4)
    q, k, v = qkv(layout, 2)
    with pytest.raises(ArrowheadError, match=r"half_windows \| got \[-2, 0\]; expected 2 integers"):
        arrow_attention(q, k, v, half_windows=[-2, 0], **arguments(layout))
    with pytest.raises(ArrowheadError, match=r"half_windows \| got \[0\].*computed heads only"):
        arrow_attention(q, k, v, half_windows=[0], **arguments(layout))


def test_wrong_layout() -> None:
    layout = TokenLayout(8, 2, False, 4)
    q, k, v = qkv(layout, 1)
    with pytest.raises(ArrowheadError, match="text_tokens=11, block=4 with 10 tokens"):
        arrow_attention(
            q, k, v, half_windows=[0], scale=1.0, text_tokens=11, text_first=False, block=4
        )


def test_wrong_source() -> None:
    layout = TokenLayout(8, 2, False, 4)
    q, k, v = qkv(layout, 1)
    with pytest.raises(ArrowheadError, match=r"source \| got \[0, 2\]; expected one index in 0..1"):
        cached_head(q, k, v, q.clone(), half_windows=[0], source=[0, 2], **arguments(layout))
