from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.tiles import (
    CACHED,
    FULL,
    TokenLayout,
    arrow_kv_blocks,
    candidate_half_windows,
    kept_pairs,
)

LAYOUTS = st.builds(
    TokenLayout,
    image_tokens=st.integers(1, 60),
    text_tokens=st.integers(0, 9),
    text_first=st.booleans(),
    block=st.integers(1, 20),
)


def _attends(layout: TokenLayout, half_window: int, query: int, key: int) -> bool:
    q, k = query - layout.image_offset, key - layout.image_offset
    is_text = not (0 <= q < layout.image_tokens and 0 <= k < layout.image_tokens)
    return is_text or abs(q // layout.block - k // layout.block) <= half_window


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, half_window=st.integers(0, 12), text_queries=st.booleans())
def test_kept_pairs_counts_the_mask(
    layout: TokenLayout, half_window: int, text_queries: bool
) -> None:
    image = range(layout.image_offset, layout.image_offset + layout.image_tokens)
    queries = range(layout.seq_len) if text_queries else image
    pairs = sum(_attends(layout, half_window, q, k) for q in queries for k in range(layout.seq_len))
    assert kept_pairs(layout, half_window, text_queries) == pairs
    assert kept_pairs(layout, FULL, text_queries) == len(queries) * layout.seq_len
    assert kept_pairs(layout, CACHED, text_queries) == 0


@given(layout=LAYOUTS)
def test_layout_covers_the_sequence(layout: TokenLayout) -> None:
    assert layout.seq_len == layout.image_tokens + layout.text_tokens
    assert (layout.blocks - 1) * layout.block < layout.image_tokens <= layout.blocks * layout.block
    first = min(layout.image_offset, layout.text_offset)
    assert first == 0 and layout.image_offset + layout.text_offset in (
        layout.image_tokens,
        layout.text_tokens,
    )


@given(layout=LAYOUTS, half_window=st.integers(0, 12))
def test_kv_blocks_stay_in_the_picture(layout: TokenLayout, half_window: int) -> None:
    for q_block in range(layout.blocks):
        kv = arrow_kv_blocks(layout, q_block, half_window)
        assert q_block in kv
        assert kv.start >= 0 and kv.stop <= layout.blocks


@pytest.mark.parametrize(
    ("tokens", "block", "expected"),
    [
        (16384, 128, (8, 4, 2)),  # FLUX and SD3 at 2K
        (4096, 128, (2, 1)),  # 1K: k=16 and k=32 are the same set of blocks
        (1024, 16, (4, 2, 1)),
        (256, 128, ()),  # two blocks: half window 1 keeps everything
        (64, 128, ()),
        (4096, 1, (256, 128, 64)),
    ],
)
def test_candidates_are_distinct_windows(
    tokens: int, block: int, expected: tuple[int, ...]
) -> None:
    assert candidate_half_windows(TokenLayout(tokens, 77, False, block)) == expected


def test_share_kept_at_flux_2k() -> None:
    layout = TokenLayout(16384, 512, True, 128)
    share = [kept_pairs(layout, w) / kept_pairs(layout, FULL) for w in (8, 4)]
    assert share == pytest.approx([0.180, 0.125], abs=5e-4)  # as measured kernels count it
