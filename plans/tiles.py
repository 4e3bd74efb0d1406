"""Token layout, mode codes and the block arithmetic of arrow attention.

Letters, used in the whole project: B batch, V image tokens, T text tokens, S = V + T,
H heads, D head_dim, L attention modules, N denoising steps.

An arrow head lets image block a attend image block b where |a - b| <= half window, and all
text; text queries attend everything. Blocks count from the first image token, so the set of
kept pairs depends on no device's tile size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

CACHED = -2
FULL = -1  # values >= 0 are arrow heads: the half window in blocks


@dataclass(frozen=True)
class TokenLayout:
    """Where the V image tokens and T text tokens of one attention module lie."""

    image_tokens: int
    text_tokens: int
    text_first: bool
    block: int = 128

    @property
    def seq_len(self) -> int:
        return self.image_tokens + self.text_tokens

    @property
    def blocks(self) -> int:
        """Image blocks; the last may be short."""
        return -(-self.image_tokens // self.block)

    @property
    def image_offset(self) -> int:
        return self.text_tokens if self.text_first else 0

    @property
    def text_offset(self) -> int:
        return 0 if self.text_first else self.image_tokens


def arrow_kv_blocks(layout: TokenLayout, q_block: int, half_window: int) -> range:
    """Return the image key blocks that one image query block attends."""
    return range(max(0, q_block - half_window), min(layout.blocks, q_block + half_window + 1))


@lru_cache(maxsize=4096)
def kept_pairs(layout: TokenLayout, mode: int, text_queries: bool = True) -> int:
    """Count the query/key pairs one head computes in `mode`.

    text_queries=False leaves the text query rows out: modules whose text output is discarded.
    """
    if mode == CACHED:
        return 0
    text_rows = layout.text_tokens if text_queries else 0
    if mode == FULL:
        return (layout.image_tokens + text_rows) * layout.seq_len
    pairs = text_rows * layout.seq_len
    for q_block in range(layout.blocks):
        kv = arrow_kv_blocks(layout, q_block, mode)
        first, end = kv.start * layout.block, min(kv.stop * layout.block, layout.image_tokens)
        rows = min(layout.block, layout.image_tokens - q_block * layout.block)
        pairs += rows * (end - first + layout.text_tokens)
    return pairs


def candidate_half_windows(
    layout: TokenLayout, divisors: Sequence[int] = (8, 16, 32)
) -> tuple[int, ...]:
    """Return the distinct half windows V/(2k), rounded up to blocks, widest first.

    A window that would keep every block is left out: it is FULL at the same price.
    """
    tokens_to_blocks = (-(-layout.image_tokens // (2 * k * layout.block)) for k in divisors)
    return tuple(sorted({w for w in tokens_to_blocks if w < layout.blocks - 1}, reverse=True))
