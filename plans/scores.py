"""Head outputs in full and in arrows on live q, k, v, and how far one output is from another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from plans.models import AttentionModule
from plans.tiles import TokenLayout

# Query rows attended at a time: enough to fill a matrix unit, few enough for a narrow key band.
_CHUNK_TOKENS = 128


def head_outputs(
    module: AttentionModule, q: Tensor, k: Tensor, v: Tensor, windows: Mapping[int, Sequence[int]]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Attend in full with all heads, and in arrows with some.

    q, k, v: [B, S, H, D]; windows: half window in blocks -> heads, ascending. Returns the full
    output [B, S, H, D] and per half window the output [B, S, len(heads), D], in q's dtype.
    """
    qt, kt, vt = (_exact(x).transpose(1, 2) for x in (q, k, v))
    full = F.scaled_dot_product_attention(qt, kt, vt)
    arrows = {}
    for half_window, heads in windows.items():
        pick = slice(None) if len(heads) == module.heads else list(heads)
        arrow = _arrow(
            module.layout, qt[:, pick], kt[:, pick], vt[:, pick], full[:, pick], half_window
        )
        arrows[half_window] = arrow.transpose(1, 2).to(q.dtype)
    return full.transpose(1, 2).to(q.dtype), arrows


def relative_squared_errors(
    approximate: Tensor, full: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return per head mean (O_m - O)^2 / mean (O - mean O)^2, [h] in fp32.

    Both [B, rows, h, D]; weights: [rows], how many rows each stands for. A constant output that is
    met exactly has error 0; one that is missed, or not finite, has error infinity.
    """

    def mean(x: Tensor) -> Tensor:
        rows = x.mean(dim=(0, 3))
        return rows.mean(dim=0) if weights is None else weights @ rows / weights.sum()

    full = full.float()
    squared = mean((approximate.float() - full).square_())
    spread = mean((full - mean(full)[:, None]).square_())
    errors = torch.where(squared == 0, squared, squared / spread)
    return torch.nan_to_num(errors, nan=torch.inf)


def counted(module: AttentionModule, output: Tensor) -> Tensor:
    """Leave out the rows of text that the module discards: [B, S, h, D] or [B, V, h, D]."""
    if module.text_output:
        return output
    return output.narrow(1, module.layout.image_offset, module.layout.image_tokens)


@dataclass(frozen=True)
class Sample:
    """Rows that stand for all counted ones: the text, and image chunks spread evenly.

    Rows are [text, image]; weights [rows] says how many each stands for.
    """

    module: AttentionModule
    chunks: tuple[tuple[int, int], ...]  # image tokens first..end
    rows: Tensor
    weights: Tensor

    @property
    def text_rows(self) -> int:
        return self.module.layout.text_tokens if self.module.text_output else 0

    def arrow(self, q: Tensor, k: Tensor, v: Tensor, full: Tensor, half_window: int) -> Tensor:
        """Return arrow attention [B, rows, H, D] of the sample; q, k, v [B, S, H, D].

        full: the sample of full attention, whose text rows are the arrow's too.
        """
        layout = self.module.layout
        qt, kt, vt = (_exact(x).transpose(1, 2) for x in (q, k, v))
        image = _band_attention(layout, qt, kt, vt, self.chunks, half_window)
        parts = [full[:, : self.text_rows], *(x.transpose(1, 2).to(q.dtype) for x in image)]
        return torch.cat(parts, dim=1)


@lru_cache(maxsize=256)
def sample_rows(module: AttentionModule, image_tokens: int, device: torch.device) -> Sample:
    """Choose about image_tokens of a module's image rows, and its text rows if they count."""
    layout = module.layout
    chunks = _chunks(layout)
    wanted = min(len(chunks), max(1, image_tokens // (chunks[0][1] - chunks[0][0])))
    # The middle ones of equal runs: at the picture's edges a band is half as wide.
    kept = tuple(chunks[(2 * i + 1) * len(chunks) // (2 * wanted)] for i in range(wanted))
    text = torch.arange(layout.text_tokens if module.text_output else 0) + layout.text_offset
    image = torch.cat([torch.arange(*chunk) for chunk in kept]) + layout.image_offset
    weights = torch.ones(len(text) + len(image))
    weights[len(text) :] = layout.image_tokens / len(image)
    return Sample(module, kept, torch.cat([text, image]).to(device), weights.to(device))


def _chunks(layout: TokenLayout) -> list[tuple[int, int]]:
    rows = -(-_CHUNK_TOKENS // layout.block) * layout.block
    return [
        (first, min(first + rows, layout.image_tokens))
        for first in range(0, layout.image_tokens, rows)
    ]


def _exact(x: Tensor) -> Tensor:
    """Give fp32 on the CPU; a GPU's kernels accumulate in it whatever they are given."""
    return x.float() if x.device.type == "cpu" else x


def _arrow(
    layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, full: Tensor, half_window: int
) -> Tensor:
    """Arrow attention [B, h, S, D], a chunk of queries at a time on the keys it can see."""
    output = torch.empty_like(full)
    text = slice(layout.text_offset, layout.text_offset + layout.text_tokens)
    output[:, :, text] = full[:, :, text]  # text attends everything
    chunks = _chunks(layout)
    images = _band_attention(layout, q, k, v, chunks, half_window)
    for (first, end), image in zip(chunks, images, strict=True):
        output[:, :, layout.image_offset + first : layout.image_offset + end] = image
    return output


def _band_attention(
    layout: TokenLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Sequence[tuple[int, int]],
    half_window: int,
) -> Iterable[Tensor]:
    """Yield [B, h, end - first, D] for chunks of image queries; q, k, v: [B, h, S, D].

    Nothing of size S x S is made, so this serves the search at every picture size.
    """
    text = slice(layout.text_offset, layout.text_offset + layout.text_tokens)
    start = layout.image_offset
    for first, end in chunks:
        keys, mask = _band(layout, first, end, half_window, q.device)
        k_seen, v_seen = (
            torch.cat([x[:, :, text], x[:, :, start + keys.start : start + keys.stop]], dim=2)
            for x in (k, v)
        )
        here = q[:, :, start + first : start + end]
        yield F.scaled_dot_product_attention(here, k_seen, v_seen, attn_mask=mask)


@lru_cache(maxsize=4096)  # 128 x a few hundred bytes each
def _band(
    layout: TokenLayout, first: int, end: int, half_window: int, device: torch.device
) -> tuple[slice, Tensor | None]:
    """Image keys that any of the queries first..end sees, and the mask over text and these keys.

    None where every query sees all of them.
    """
    q_block = torch.arange(first, end, device=device) // layout.block
    first_block, last_block = first // layout.block, (end - 1) // layout.block
    keys = slice(
        max(0, (first_block - half_window) * layout.block),
        min(layout.image_tokens, (last_block + half_window + 1) * layout.block),
    )
    k_block = torch.arange(keys.start, keys.stop, device=device) // layout.block
    seen = (q_block[:, None] - k_block[None, :]).abs() <= half_window
    if first_block == last_block or bool(seen.all()):
        return keys, None
    return keys, F.pad(seen, (layout.text_tokens, 0), value=True)
