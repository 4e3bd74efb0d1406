"""Read the facts of a caption back from a picture.

`Reader` is a small convolutional network that names, for each of the nine places, the object
there, and the ground; `score` compares that with what the captions state. It is fitted on drawn
pictures only (`train.fit_reader`), so it knows nothing of the diffusion models it marks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.testbed import scenes
from tests.testbed.scenes import GRID, Fact

WEIGHTS = Path(__file__).parent / "reader.safetensors"
PER_PLACE = {
    "shape": len(scenes.SHAPES) + 1,  # the last: no object here
    "colour": len(scenes.COLOURS),
    "size": len(scenes.SIZES),
}
PER_PICTURE = {"texture": len(scenes.TEXTURES), "ground": len(scenes.GROUNDS)}
EMPTY = len(scenes.SHAPES)


class Reader(nn.Module):
    """Map pictures [n, 3, 256, 256] in -1..1 to logits per place and per picture."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (3, 24, 48, 64, 96), []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        width = 2 * widths[-1]
        self.place = nn.Sequential(nn.Linear(width, 128), nn.ReLU())
        self.place_heads = nn.ModuleDict({k: nn.Linear(128, n) for k, n in PER_PLACE.items()})
        self.picture = nn.Sequential(nn.Linear(width, 128), nn.ReLU())
        self.picture_heads = nn.ModuleDict({k: nn.Linear(128, n) for k, n in PER_PICTURE.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return logits: per place [n, 9, kinds], per picture [n, kinds]."""
        seen = self.trunk(pictures)
        mean = nn.functional.adaptive_avg_pool2d(seen, GRID)
        peak = nn.functional.adaptive_max_pool2d(seen, GRID)
        cells = torch.cat([mean, peak], 1).flatten(2).transpose(1, 2)
        whole = torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], 1)
        place, picture = self.place(cells), self.picture(whole)
        answers = {kind: head(place) for kind, head in self.place_heads.items()}
        return answers | {kind: head(picture) for kind, head in self.picture_heads.items()}


@cache
def load_reader(device: str = "cpu") -> Reader:
    """Load the trained reader."""
    reader = Reader()
    reader.load_state_dict(load_file(WEIGHTS))
    return reader.eval().requires_grad_(False).to(device)


def _holds(fact: Fact, read: dict[str, np.ndarray], at: dict[int, int], occupied: int) -> bool:
    if fact.subject < 0:
        return bool((occupied if fact.kind == "count" else read[fact.kind]) == fact.value)
    cell = at.get(fact.subject)
    if cell is None:
        return False
    if fact.kind in ("shape", "size", "colour"):
        return bool(read[fact.kind][cell] == fact.value)
    if fact.kind == "place":
        return cell == fact.value
    other = at.get(fact.other)
    if other is None:
        return False
    down, right = cell // GRID - other // GRID, cell % GRID - other % GRID
    reach = (-right, right, -down, down)[fact.value]
    return reach > 0 and reach >= max(abs(down), abs(right))


def judge(stated: Sequence[Fact], read: dict[str, np.ndarray]) -> list[bool]:
    """Say of each fact whether it holds; an object is recognised by its colour, unique in a scene.

    `read` maps kinds to the reader's choice: [9] per place, a scalar per picture. A relation
    holds if the direction is the stated one and no other is stronger.
    """
    full = np.flatnonzero(read["shape"] != EMPTY)
    at: dict[int, int] = {}
    for fact in stated:
        if fact.kind == "colour":
            cells = [int(c) for c in full if read["colour"][c] == fact.value]
            if cells:
                at[fact.subject] = cells[0]
    return [_holds(fact, read, at, len(full)) for fact in stated]


@torch.no_grad()
def read_pictures(pictures: Tensor, batch: int = 100) -> list[dict[str, np.ndarray]]:
    """Read pictures [n, 3, 256, 256] in -1..1."""
    reader = load_reader(str(pictures.device))
    found = []
    for part in pictures.float().split(batch):
        choice = {k: v.argmax(-1).cpu().numpy() for k, v in reader(part).items()}
        found += [{k: v[i] for k, v in choice.items()} for i in range(len(part))]
    return found


def verdicts(captions: Sequence[str], pictures: Tensor) -> list[list[bool]]:
    """Judge every stated fact of every caption in its picture."""
    read = read_pictures(pictures)
    return [judge(scenes.parse_caption(c), r) for c, r in zip(captions, read, strict=True)]


def score(captions: Sequence[str], images: Sequence[Image] | Tensor) -> dict[str, float]:
    """Mark pictures by their captions.

    Returns shares in 0..1: "accuracy" per stated fact, "captions_right" of wholly right pictures,
    and one per kind of fact. Images are PIL pictures or [n, 3, 256, 256] in -1..1.
    """
    if not isinstance(images, Tensor):
        stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
        images = torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1
    kinds: defaultdict[str, list[bool]] = defaultdict(list)
    for text, marks in zip(captions, verdicts(captions, images), strict=True):
        kinds["captions_right"].append(all(marks))
        for fact, holds in zip(scenes.parse_caption(text), marks, strict=True):
            kinds["accuracy"].append(holds)
            kinds[fact.kind].append(holds)
    return {kind: sum(marks) / len(marks) for kind, marks in kinds.items()}
