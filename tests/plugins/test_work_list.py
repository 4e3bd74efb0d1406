"""The order of work: every tile once, longest first, copies last."""

from __future__ import annotations

import ctypes
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plans.tiles import CACHED, FULL
from plugins.torch.library import MAX_HEADS, HeadTask, TokenLayout

TEXT, IMAGE = 0, 1
CHUNK = 512


def tickets(
    library: ctypes.CDLL, layout: TokenLayout, tasks: list[tuple[int, int]], batch: int,
    tile_q: int = 128, text_queries: bool = True,
) -> list[tuple[int, ...]]:  # fmt: skip
    """(head, batch row, segment, tile) of every ticket, in order."""
    array = (HeadTask * len(tasks))(*(HeadTask(mode, source, -1) for mode, source in tasks))
    capacity = 200_000
    out = (ctypes.c_int * (4 * capacity))()
    n = library.arrowhead_tickets(
        layout, batch, int(text_queries), tile_q, CHUNK, len(tasks), array, out, capacity
    )
    assert n >= 0
    return [tuple(out[4 * i : 4 * i + 4]) for i in range(n)]


def cost(layout: TokenLayout, mode: int, segment: int) -> int:
    """Key tokens of a tile, about; what the order is by."""
    if mode == CACHED:
        return 0
    blocks = -(-layout.image_tokens // layout.block)
    if mode == FULL or segment == TEXT or mode >= blocks - 1:
        return 2**31
    return mode + 1


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    image=st.integers(0, 3000),
    text=st.integers(0, 600),
    block=st.integers(1, 200),
    tasks=st.lists(
        st.tuples(st.one_of(st.sampled_from([CACHED, FULL]), st.integers(0, 40)),
                  st.integers(-1, 3)),
        min_size=1, max_size=MAX_HEADS,
    ),
    batch=st.integers(1, 3),
    tile_q=st.sampled_from([128, 192]),
    text_queries=st.booleans(),
)  # fmt: skip
def test_every_tile_once_and_longest_first(
    tiles: ctypes.CDLL, image: int, text: int, block: int, tasks: list[tuple[int, int]],
    batch: int, tile_q: int, text_queries: bool,
) -> None:  # fmt: skip
    layout = TokenLayout(image, text, block)
    work = tickets(tiles, layout, tasks, batch, tile_q, text_queries)
    expected = set()
    for head, (mode, source) in enumerate(tasks):
        if mode == CACHED and source < 0:
            continue  # already in the output
        rows = CHUNK if mode == CACHED else tile_q
        for segment, tokens in ((TEXT, text if text_queries else 0), (IMAGE, image)):
            expected |= {
                (head, b, segment, tile) for b in range(batch) for tile in range(-(-tokens // rows))
            }
    assert len(work) == len(expected) and set(work) == expected
    costs = [cost(layout, tasks[head][0], segment) for head, _, segment, _ in work]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("batch", [1, 2])
def test_tiles_that_share_keys_are_adjacent(tiles: ctypes.CDLL, batch: int) -> None:
    tasks = [(FULL, 0), (3, 1), (FULL, 2), (CACHED, 0), (5, 3), (3, 4)]
    work = tickets(tiles, TokenLayout(4096, 333, 128), tasks, batch)
    order = [key for key, _ in groupby((head, b) for head, b, _, _ in work)]
    rows = range(batch)
    expected = [(h, b) for h in (0, 2) for b in rows]  # full heads, head by head
    expected += [(h, b) for h in (1, 4, 5) for b in rows]  # text rows of arrow heads
    expected += [(h, b) for h in (4, 1, 5) for b in rows]  # bands, widest first
    expected += [(3, b) for b in rows]  # copies
    assert order == expected
