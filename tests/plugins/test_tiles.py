"""plugins/kernels/tiles.h against plans.tiles: the same pairs, each exactly once."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plans import reference
from plans import tiles as plan_tiles
from plans.tiles import FULL
from plugins.torch.library import TokenLayout
from tests.plugins.kernel_model import KernelModel

layouts = st.tuples(
    st.one_of(st.integers(0, 700), st.sampled_from([128, 256, 384, 512, 640])),
    st.one_of(st.integers(0, 300), st.sampled_from([0, 77, 128, 333])),
    st.one_of(st.integers(1, 300), st.sampled_from([1, 16, 64, 128])),
).filter(lambda layout: layout[0] + layout[1] > 0)
half_windows = st.one_of(st.integers(-1, 12), st.integers(0, 800), st.just(2**30))
tile_shapes = st.sampled_from([(128, 128), (192, 128), (128, 64)])
sweep = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def python_layout(image: int, text: int, block: int) -> plan_tiles.TokenLayout:
    return plan_tiles.TokenLayout(image, text, text_first=False, block=block)


@sweep
@given(layout=layouts, half_window=half_windows, text_queries=st.booleans())
def test_same_arithmetic_as_plans(
    tiles: ctypes.CDLL, layout: tuple[int, int, int], half_window: int, text_queries: bool
) -> None:
    c_layout, p_layout = TokenLayout(*layout), python_layout(*layout)
    out = (ctypes.c_int * 2)()
    for q_block in range(p_layout.blocks if half_window >= 0 else 0):
        tiles.arrowhead_arrow_kv_blocks(c_layout, q_block, min(half_window, 2**20), out)
        expected = plan_tiles.arrow_kv_blocks(p_layout, q_block, half_window)
        assert tuple(out) == (expected.start, expected.stop)
    bounded = min(half_window, 2**20)
    assert tiles.arrowhead_kept_pairs(c_layout, bounded, text_queries) == plan_tiles.kept_pairs(
        p_layout, bounded, text_queries
    )
    assert tiles.arrowhead_kept_pairs(c_layout, plan_tiles.CACHED, text_queries) == 0


@sweep
@given(layout=layouts, mode=half_windows, shape=tile_shapes)
def test_every_kept_pair_is_visited_once(
    tiles: ctypes.CDLL, layout: tuple[int, int, int], mode: int, shape: tuple[int, int]
) -> None:
    model = KernelModel(tiles, *layout, *shape)
    seq_len = layout[0] + layout[1]
    visits = np.zeros((seq_len, seq_len), np.int32)
    for tile in model.tiles(mode):
        visits[tile.rows, tile.keys] += tile.visible
    expected = np.ones((seq_len, seq_len), bool)
    if mode != FULL:
        expected = reference.arrow_mask(python_layout(*layout), mode).numpy()
    np.testing.assert_array_equal(visits, expected)


@pytest.mark.parametrize("tile_q", [128, 192])
@pytest.mark.parametrize("text", [0, 333, 512])
def test_no_mask_in_a_band_of_whole_tiles(tiles: ctypes.CDLL, tile_q: int, text: int) -> None:
    """At block 128 only the segments' short last tiles may be masked, and no tile is wasted."""
    model = KernelModel(tiles, 4096, text, 128, tile_q, 128)
    for begin in range(0, 4096, tile_q):
        for group in range(tile_q // 64):
            first = begin + 64 * group
            if first >= 4096:
                continue
            own = model.walk(1, begin, group, 3)
            masked = [tile for tile in own if tile[2]]
            assert masked == ([(0, text // 128, 1)] if text % 128 else [])
            band = plan_tiles.arrow_kv_blocks(python_layout(4096, text, 128), first // 128, 3)
            assert [tile for segment, tile, _ in own if segment == 1] == list(band)


def test_long_sequences_stay_in_integer_range(tiles: ctypes.CDLL) -> None:
    """2^28 tokens is what the launch accepts."""
    model = KernelModel(tiles, 2**28, 0, 128)
    last = 2**28 - 128
    assert [t[1] for t in model.kv_list(1, last, last + 128, 2)] == [
        2**21 - 3, 2**21 - 2, 2**21 - 1
    ]  # fmt: skip
    out = (ctypes.c_int * 2)()
    tiles.arrowhead_visible_keys(model.layout, 1, 1, last, 2**20, out)
    assert tuple(out) == ((2**21 - 1 - 2**20) * 128, 2**28)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(layout=layouts, mode=half_windows, shape=tile_shapes, seed=st.integers(0, 2**31))
def test_loop_structure_computes_attention(
    tiles: ctypes.CDLL, layout: tuple[int, int, int], mode: int, shape: tuple[int, int], seed: int
) -> None:
    """The kernels' list and online softmax, emulated in fp32, against the reference."""
    image, text, block = layout
    rng = np.random.default_rng(seed)
    q, k, v = (3 * rng.standard_normal((3, image + text, 16), np.float32)).astype(np.float32)
    v /= 3
    out = KernelModel(tiles, *layout, *shape).attend(q, k, v, mode)
    expected = reference.arrow_attention(
        *(torch.from_numpy(x)[None, :, None] for x in (q, k, v)),
        scale=0.25, text_tokens=text, text_first=False, block=block, half_windows=[mode],
    )  # fmt: skip
    np.testing.assert_allclose(out, expected[0, :, 0].numpy(), atol=2e-5)
