"""What the CUDA kernels do with the tile arithmetic, in numpy: which pairs, and in which order."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from plugins.torch.library import TokenLayout

TEXT, IMAGE = 0, 1
GROUP_ROWS = 64  # one warpgroup's query rows
NEGATIVE = np.float32(-np.inf)


@dataclass(frozen=True)
class Tile:
    """Rows of one group against keys of one tile; `visible` says which pairs count."""

    rows: slice
    keys: slice
    visible: np.ndarray


@dataclass(frozen=True)
class KernelModel:
    """A kernel's tile shape on one token layout. Tokens count image first, then text."""

    exports: ctypes.CDLL
    image_tokens: int
    text_tokens: int
    block: int
    tile_q: int = 128
    tile_k: int = 128

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.image_tokens, self.text_tokens, self.block)

    def tokens(self, segment: int) -> int:
        return self.text_tokens if segment == TEXT else self.image_tokens

    def offset(self, segment: int) -> int:
        return self.image_tokens if segment == TEXT else 0

    def kv_list(self, segment: int, begin: int, end: int, mode: int) -> list[tuple[int, ...]]:
        """(segment, tile, masked) in the order of work."""
        out = (ctypes.c_int * 30000)()
        n = self.exports.arrowhead_kv_list(
            self.layout, segment, begin, end, mode, self.tile_k, out, 10000
        )
        assert n >= 0
        return [tuple(out[3 * i : 3 * i + 3]) for i in range(n)]

    def walk(self, segment: int, begin: int, group: int, mode: int) -> list[tuple[int, ...]]:
        """Follow one group through the tile's whole list; check that it may skip what it skips."""
        first = begin + GROUP_ROWS * group
        whole = self.kv_list(segment, begin, begin + self.tile_q, mode)
        own = self.kv_list(segment, first, first + GROUP_ROWS, mode)
        walk = (ctypes.c_int * (4 + len(own)))()
        tiles = self.exports.arrowhead_walk(
            self.layout, segment, begin, begin + self.tile_q, first, first + GROUP_ROWS, mode,
            self.tile_k, walk, len(own),
        )  # fmt: skip
        assert tiles == len(own)
        assert walk[4:] == [masked for _, _, masked in own]
        walked: list[tuple[int, ...]] = []
        position = 0
        for step, count in enumerate(walk[:4]):
            assert count >= 0
            if step % 2 == 0:
                expected = own[len(walked) : len(walked) + count]
                assert [t[:2] for t in whole[position : position + count]] == [
                    t[:2] for t in expected
                ]
                walked += expected
            position += count
        assert position == len(whole), "every group gives back every buffer"
        assert walked == own
        return own

    def tiles(self, mode: int) -> Iterator[Tile]:
        """Every (group, key tile) that the kernel computes for one head, in its order."""
        for segment in (TEXT, IMAGE):
            for begin in range(0, self.tokens(segment), self.tile_q):
                for group in range(self.tile_q // GROUP_ROWS):
                    first = begin + GROUP_ROWS * group
                    last = min(first + GROUP_ROWS, self.tokens(segment))
                    for tile in self.walk(segment, begin, group, mode):
                        yield self.tile(segment, first, last, mode, tile)

    def tile(self, segment: int, first: int, last: int, mode: int, tile: tuple[int, ...]) -> Tile:
        key_segment, index, masked = tile
        key = index * self.tile_k
        keys = np.arange(key, key + self.tile_k)
        visible = np.ones((last - first, self.tile_k), bool)
        if masked:
            for row in range(first, last):
                see = (ctypes.c_int * 2)()
                self.exports.arrowhead_visible_keys(
                    self.layout, segment, key_segment, row, mode, see
                )
                visible[row - first] = (see[0] <= keys) & (keys < see[1])
        real = keys < self.tokens(key_segment)
        assert not visible[:, ~real].any(), "keys past the segment's end must be masked"
        row = self.offset(segment)
        column = self.offset(key_segment)
        count = int(real.sum())
        return Tile(
            slice(row + first, row + last),
            slice(column + key, column + key + count),
            visible[:, :count],
        )

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, mode: int) -> np.ndarray:
        """Online softmax in the kernel's order, in fp32: [S, D] each, image tokens first."""
        out = np.full_like(q, np.nan)
        top = np.full(len(q), NEGATIVE)
        total = np.zeros(len(q), np.float32)
        for tile in self.tiles(mode):
            scores = (q[tile.rows] @ k[tile.keys].T) / np.float32(np.sqrt(q.shape[1]))
            scores = np.where(tile.visible, scores, NEGATIVE)
            before = top[tile.rows]
            now = np.maximum(before, scores.max(axis=1))
            shift = np.where(np.isneginf(now), np.float32(0), now)
            rescale = np.exp(before - shift)
            weights = np.exp(scores - shift[:, None])
            top[tile.rows] = now
            total[tile.rows] = total[tile.rows] * rescale + weights.sum(axis=1)
            kept = np.where(np.isnan(out[tile.rows]), 0, out[tile.rows])
            out[tile.rows] = kept * rescale[:, None] + weights @ v[tile.keys]
        return out / total[:, None]
