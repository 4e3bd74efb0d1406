"""Rows of a module's output that stand for all, and what full and arrow attention are on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from plans.models import AttentionModule
from plans.scores import attention
from plans.tiles import TokenLayout

# Image rows that errors are told from: enough for 1 %, few beside the 16384 of a 2K picture.
SAMPLE_TOKENS = 2048
# Neighbouring rows sampled together: enough to fill a matrix unit, few enough for a narrow band.
_CHUNK_TOKENS = 128


@dataclass(frozen=True)
class _Band:
    """Chunks of image rows that lie alike among the keys they see.

    keys: [chunks, K] text and image keys of the widest window, nearest first: a narrower window's
    are the first of them. windows: half window -> how many, and the mask [rows, keys] over them,
    None where all rows see all of them.
    """

    first: int  # of the sample's rows
    rows: int  # of one chunk
    keys: Tensor
    windows: dict[int, tuple[int, Tensor | None]]


@dataclass(frozen=True)
class Sample:
    """Rows that stand for all counted ones: the text, and image chunks spread evenly.

    Rows are [text, image]; weights [rows] says how many each stands for.
    """

    rows: Tensor
    weights: Tensor
    text_rows: int
    bands: tuple[_Band, ...]

    def of(self, output: Tensor) -> Tensor:
        """Take the sample out of an output [B, S, H, D]."""
        return output.index_select(1, self.rows)

    def full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return full attention on the sample alone, [B, rows, H, D]; q, k, v [B, S, H, D]."""
        return attention(self.of(q), k, v)

    def arrows(self, q: Tensor, k: Tensor, v: Tensor, full: Tensor, out: Tensor) -> None:
        """Write arrow attention of every window, ascending, into out [W, B, rows, H, D].

        full: the sample of full attention, whose text rows are the arrows' too. A few launches,
        however many chunks there are.
        """
        out[:, :, : self.text_rows] = full[:, : self.text_rows]
        seen = self.of(q)
        batch = q.shape[0]
        for band in self.bands:
            chunks, end = len(band.keys), band.first + len(band.keys) * band.rows
            here = seen[:, band.first : end].unflatten(1, (chunks, band.rows)).flatten(0, 1)
            index = band.keys.flatten()
            near_k, near_v = (
                x.index_select(1, index).unflatten(1, (chunks, -1)).flatten(0, 1) for x in (k, v)
            )
            for i, (count, mask) in enumerate(band.windows.values()):
                arrow = attention(here, near_k[:, :count], near_v[:, :count], mask)
                out[i, :, band.first : end] = arrow.reshape(batch, -1, *arrow.shape[2:])


def sample_of(
    module: AttentionModule,
    device: torch.device,
    windows: Sequence[int] = (),
    image_tokens: int = SAMPLE_TOKENS,
) -> Sample:
    """Choose about image_tokens of a module's image rows, and its text rows if they count."""
    return _sample(module.layout, module.text_output, device, tuple(sorted(windows)), image_tokens)


@lru_cache(maxsize=64)  # modules of one layout share it: some megabytes
def _sample(
    layout: TokenLayout,
    text_output: bool,
    device: torch.device,
    windows: tuple[int, ...],
    image_tokens: int,
) -> Sample:
    chunks = _chunks(layout)
    wanted = min(len(chunks), max(1, image_tokens // (chunks[0][1] - chunks[0][0])))
    # The middle ones of equal runs: at the picture's edges a band is half as wide.
    kept = [chunks[(2 * i + 1) * len(chunks) // (2 * wanted)] for i in range(wanted)]
    alike: dict[tuple[int, bytes], list[tuple[int, int]]] = {}
    for chunk in kept:
        _, distance = _near(layout, chunk, max(windows, default=0))
        alike.setdefault((chunk[1] - chunk[0], distance.numpy().tobytes()), []).append(chunk)
    text = torch.arange(layout.text_tokens if text_output else 0) + layout.text_offset
    bands: list[_Band] = []
    parts, first = [text], len(text)
    for same in alike.values():
        if windows:
            bands.append(_band(layout, same, windows, first, device))
        parts += [torch.arange(*chunk) + layout.image_offset for chunk in same]
        first += sum(end - begin for begin, end in same)
    rows = torch.cat(parts)
    weights = torch.ones(len(rows))
    weights[len(text) :] = layout.image_tokens / (len(rows) - len(text))
    return Sample(rows.to(device), weights.to(device), len(text), tuple(bands))


def _chunks(layout: TokenLayout) -> list[tuple[int, int]]:
    rows = -(-_CHUNK_TOKENS // layout.block) * layout.block
    return [
        (first, min(first + rows, layout.image_tokens))
        for first in range(0, layout.image_tokens, rows)
    ]


def _near(layout: TokenLayout, chunk: tuple[int, int], widest: int) -> tuple[Tensor, Tensor]:
    """Image keys that a chunk sees in the widest window, nearest first, and their blocks' places.

    The places are relative to the chunk's first block, so that chunks that lie alike have the same.
    """
    first, last = chunk[0] // layout.block, (chunk[1] - 1) // layout.block
    keys = torch.arange(
        max(0, (first - widest) * layout.block),
        min(layout.image_tokens, (last + widest + 1) * layout.block),
    )
    place = keys // layout.block - first
    distance = torch.maximum(-place, place - (last - first)).clamp(min=0)
    order = distance.argsort(stable=True)
    return keys[order], place[order]


def _band(
    layout: TokenLayout,
    chunks: Sequence[tuple[int, int]],
    windows: Sequence[int],
    first: int,
    device: torch.device,
) -> _Band:
    near = [_near(layout, chunk, windows[-1]) for chunk in chunks]
    place = near[0][1]
    q_place = torch.arange(*chunks[0]) // layout.block - chunks[0][0] // layout.block
    away = (q_place[:, None] - place).abs()
    nearest = away.min(dim=0).values
    shapes: dict[int, tuple[int, Tensor | None]] = {}
    for window in windows:
        count = int((nearest <= window).sum())
        seen = away[:, :count] <= window
        mask = None
        if not bool(seen.all()):
            text = torch.ones(len(q_place), layout.text_tokens, dtype=torch.bool)
            mask = torch.cat([text, seen], dim=1).to(device)
        shapes[window] = (layout.text_tokens + count, mask)
    text = torch.arange(layout.text_tokens) + layout.text_offset
    keys = torch.stack([torch.cat([text, image + layout.image_offset]) for image, _ in near])
    return _Band(first, len(q_place), keys.to(device), shapes)
