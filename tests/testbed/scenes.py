"""Captioned pictures: what is in a scene, how it is said, and how it is drawn.

A scene is two to four objects on a 3 x 3 grid of places over a textured ground. `Scenes` holds
many at once as integer arrays, `caption` says one in words, and `render` draws a batch on any
device. What a caption states is listed by `facts`; `tests.testbed.reader` checks it in a picture.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

SIDE = 256  # pixels
GRID = 3  # places per side
MAX_OBJECTS = 4

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.58, 0.20),
    "blue": (0.13, 0.33, 0.90),
    "yellow": (0.97, 0.86, 0.13),
    "purple": (0.58, 0.17, 0.68),
    "orange": (0.97, 0.52, 0.08),
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.07),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("small", "large")
RADII = ((15.0, 18.0), (28.0, 34.0))  # pixels, by size
JITTER = (12.0, 5.0)  # pixels about the place's centre, by size
PLACES = (
    ("top left", "top center", "top right"),
    ("center left", "center", "center right"),
    ("bottom left", "bottom center", "bottom right"),
)
TEXTURES = ("plain", "striped", "checkered", "dotted", "wavy", "cloudy")
GROUNDS = {
    "gray": (0.62, 0.62, 0.64),
    "tan": (0.80, 0.69, 0.52),
    "mint": (0.60, 0.80, 0.70),
    "lavender": (0.72, 0.66, 0.86),
    "navy": (0.24, 0.30, 0.46),
}
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Fact:
    """One checkable statement of a caption about object `subject` (-1: the ground or the whole)."""

    kind: str  # colour | shape | size | place | relation | texture | ground | count
    subject: int
    value: int
    other: int = -1  # the second object of a relation


@dataclass
class Scenes:
    """`n` scenes as arrays; objects beyond `count` are unused.

    Shapes: count, texture, ground [n]; cell, colour, shape, size [n, 4]; look [n, 4, 4] uniform
    draws for radius, x, y and angle; pattern [n, 4] uniform draws for the ground's pattern;
    phrasing [n, 5] uniform draws that choose the caption's wording.
    """

    count: np.ndarray
    texture: np.ndarray
    ground: np.ndarray
    cell: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    size: np.ndarray
    look: np.ndarray
    pattern: np.ndarray
    phrasing: np.ndarray

    def __len__(self) -> int:
        return len(self.count)

    def take(self, index: np.ndarray | Sequence[int]) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def _draw(n: int, rng: np.random.Generator) -> Scenes:
    def distinct(kinds: int) -> np.ndarray:
        return rng.random((n, kinds)).argsort(1)[:, :MAX_OBJECTS]

    return Scenes(
        count=rng.integers(2, MAX_OBJECTS + 1, n),
        texture=rng.integers(0, len(TEXTURES), n),
        ground=rng.integers(0, len(GROUNDS), n),
        cell=distinct(GRID * GRID),
        colour=distinct(len(COLOURS)),
        shape=rng.integers(0, len(SHAPES), (n, MAX_OBJECTS)),
        size=rng.integers(0, len(SIZES), (n, MAX_OBJECTS)),
        look=rng.random((n, MAX_OBJECTS, 4)),
        pattern=rng.random((n, 4)),
        phrasing=rng.random((n, MAX_OBJECTS + 1)),
    )


def _held_out(scenes: Scenes) -> np.ndarray:
    """Mark one combination in sixteen: everything a caption can state, whatever the order."""
    kinds = np.stack([scenes.colour, scenes.shape, scenes.size, scenes.cell], -1).astype(np.int8)
    marks = np.empty(len(scenes), bool)
    for i, count in enumerate(scenes.count):
        objects = sorted(kinds[i, :count].tolist())
        key = repr((objects, int(scenes.texture[i]), int(scenes.ground[i])))
        marks[i] = zlib.crc32(key.encode()) % 16 == 0
    return marks


def sample_scenes(n: int, seed: int, *, held_out: bool = False) -> Scenes:
    """Draw `n` scenes; training draws never contain a held-out combination, and the reverse."""
    rng = np.random.default_rng([seed, held_out])
    drawn = _draw(n * 24 + 200 if held_out else n + n // 8 + 200, rng)
    return drawn.take(np.flatnonzero(_held_out(drawn) == held_out)[:n])


def facts(scenes: Scenes, i: int) -> list[Fact]:
    """List what the caption of scene `i` states, in the order it says it.

    An object is placed either by its place or by a relation to one named before it in the same
    row or column; the first is always placed by its place.
    """
    stated = []
    for j in range(int(scenes.count[i])):
        stated.append(Fact("size", j, int(scenes.size[i, j])))
        stated.append(Fact("colour", j, int(scenes.colour[i, j])))
        stated.append(Fact("shape", j, int(scenes.shape[i, j])))
        row, col = divmod(int(scenes.cell[i, j]), GRID)
        options = []
        for k in range(j):
            other_row, other_col = divmod(int(scenes.cell[i, k]), GRID)
            if row == other_row:
                options.append((0 if col < other_col else 1, k))
            elif col == other_col:
                options.append((2 if row < other_row else 3, k))
        draw = scenes.phrasing[i, j] * 2
        if options and draw < 1:
            relation, k = options[int(draw * len(options))]
            stated.append(Fact("relation", j, relation, k))
        else:
            stated.append(Fact("place", j, int(scenes.cell[i, j])))
    stated.append(Fact("texture", -1, int(scenes.texture[i])))
    stated.append(Fact("ground", -1, int(scenes.ground[i])))
    stated.append(Fact("count", -1, int(scenes.count[i])))
    return stated


def caption(stated: Sequence[Fact]) -> str:
    """Say facts in words: "a large red ring at the top left, ..., on a dotted tan ground"."""
    colours, grounds = tuple(COLOURS), tuple(GROUNDS)
    name: dict[int, str] = {}
    words: list[str] = []
    for fact in stated:
        if fact.kind == "size":
            words.append(f"a {SIZES[fact.value]}")
        elif fact.kind == "colour":
            name[fact.subject] = colours[fact.value]
        elif fact.kind == "shape":
            name[fact.subject] += f" {SHAPES[fact.value]}"
            words.append(name[fact.subject])
        elif fact.kind == "place":
            row, col = divmod(fact.value, GRID)
            words.append(f"at the {PLACES[row][col]},")
        elif fact.kind == "relation":
            words.append(f"{RELATIONS[fact.value]} the {name[fact.other]},")
        elif fact.kind == "texture":
            words.append(f"on a {TEXTURES[fact.value]}")
        elif fact.kind == "ground":
            words.append(f"{grounds[fact.value]} ground")
    return " ".join(words)


def parse_caption(text: str) -> list[Fact]:
    """Invert `caption`. Raises ValueError on a text that is none."""
    try:
        return _parse(text)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"not a caption of a scene: {text!r}") from error


def _parse(text: str) -> list[Fact]:
    colours, grounds = list(COLOURS), list(GROUNDS)
    places = {name: r * GRID + c for r, row in enumerate(PLACES) for c, name in enumerate(row)}
    *clauses, last = text.split(", ")
    stated: list[Fact] = []
    names: list[str] = []
    for j, clause in enumerate(clauses):
        words = clause.split()
        size, colour, shape = SIZES.index(words[1]), colours.index(words[2]), words[3]
        stated += [Fact("size", j, size), Fact("colour", j, colour)]
        stated.append(Fact("shape", j, SHAPES.index(shape)))
        rest = " ".join(words[4:])
        if rest.startswith("at the "):
            stated.append(Fact("place", j, places[rest.removeprefix("at the ")]))
        else:
            relation, other = rest.split(" the ")
            stated.append(Fact("relation", j, RELATIONS.index(relation), names.index(other)))
        names.append(f"{words[2]} {shape}")
    _, _, texture, ground, _ = last.split()
    stated.append(Fact("texture", -1, TEXTURES.index(texture)))
    stated.append(Fact("ground", -1, grounds.index(ground)))
    stated.append(Fact("count", -1, len(clauses)))
    return stated


def _shape_distance(shape: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels (negative inside) of points [n, p, p] to each scene's shape [n]."""
    rho = torch.sqrt(x * x + y * y + 1e-6)
    ax, ay = x.abs(), y.abs()
    circle = rho - r
    square = torch.maximum(ax, ay) - 0.86 * r
    half = math.sqrt(3) / 2
    triangle = torch.maximum(half * ax - 0.5 * y, y) - 0.5 * r
    sector = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    px, py = rho * torch.cos(angle), rho * torch.sin(angle).abs()
    bx, by = 0.45 * math.cos(sector / 2), 0.45 * math.sin(sector / 2)
    star = ((px - r) * by + py * (1 - bx)) / math.hypot(1 - bx, by)
    ring = (rho - 0.72 * r).abs() - 0.26 * r
    bar = 0.34 * r
    cross = torch.minimum(
        torch.maximum(ax - r, ay - bar),
        torch.maximum(ax - bar, ay - r),
    )
    every = (circle, square, triangle, star, ring, cross)
    pick = shape[:, None, None]
    out = circle
    for code, distance in enumerate(every):
        out = torch.where(pick == code, distance, out)
    return out


def _ground(scenes: Scenes, x: Tensor, y: Tensor) -> Tensor:
    """Draw the grounds, [n, 3, SIDE, SIDE] in 0..1."""
    device = x.device
    draw = torch.as_tensor(scenes.pattern, dtype=torch.float32, device=device)
    a, b, c, d = (draw[:, i, None, None] for i in range(4))
    tau = 2 * math.pi
    theta = a * math.pi
    along = x * torch.cos(theta) + y * torch.sin(theta)
    striped = torch.tanh(4 * torch.sin(tau * (along / (18 + 12 * b) + c)))
    period = 32 + 16 * a
    checkered = torch.tanh(
        8 * torch.sin(tau * (x / period + b)) * torch.sin(tau * (y / period + c))
    )
    pitch = 20 + 10 * a
    dx = torch.remainder(x / pitch + b, 1) - 0.5
    dy = torch.remainder(y / pitch + c, 1) - 0.5
    dotted = torch.tanh(8 * (0.27 - torch.sqrt(dx * dx + dy * dy + 1e-6)) * 2)
    swing = (7 + 4 * a) * torch.sin(tau * (x / (56 + 24 * b) + c))
    wavy = torch.tanh(4 * torch.sin(tau * ((y + swing) / (20 + 10 * d))))
    seeds = (draw * 997).sum(1)[:, None, None]
    knots = torch.arange(12, device=device, dtype=torch.float32)
    field = torch.frac(torch.sin(seeds + knots[:, None] * 12.9898 + knots * 78.233) * 4375.85)
    cloudy = torch.nn.functional.interpolate(
        field.abs()[:, None], size=(SIDE, SIDE), mode="bicubic", align_corners=True
    )[:, 0]
    cloudy = 2.4 * (cloudy - 0.5)
    plain = (y / SIDE - 0.5) * 0.8 + 0 * a
    texture = torch.as_tensor(scenes.texture, device=device)[:, None, None]
    value = plain
    for code, pattern in enumerate((plain, striped, checkered, dotted, wavy, cloudy)):
        value = torch.where(texture == code, pattern, value)
    palette = torch.tensor(list(GROUNDS.values()), device=device)
    base = palette[torch.as_tensor(scenes.ground, device=device)][:, :, None, None]
    return base * (1 + 0.16 * value[:, None])


def render(scenes: Scenes, device: torch.device | str = "cpu") -> Tensor:
    """Draw the scenes: float32 [n, 3, SIDE, SIDE] in -1..1."""
    grid = torch.arange(SIDE, device=device, dtype=torch.float32) + 0.5
    y, x = grid[None, :, None], grid[None, None, :]
    picture = _ground(scenes, x, y)
    palette = torch.tensor(list(COLOURS.values()), device=device)
    on = {
        name: torch.as_tensor(getattr(scenes, name), device=device)
        for name in ("count", "cell", "colour", "shape", "size")
    }
    look = torch.as_tensor(scenes.look, dtype=torch.float32, device=device)
    radii = torch.tensor(RADII, device=device)
    jitter = torch.tensor(JITTER, device=device)
    step = SIDE / GRID
    for j in range(MAX_OBJECTS):
        size, cell = on["size"][:, j], on["cell"][:, j]
        low, high = radii[size].unbind(1)
        r = (low + (high - low) * look[:, j, 0])[:, None, None]
        shift = (2 * look[:, j, 1:3] - 1) * jitter[size][:, None]
        cx = ((cell % GRID + 0.5) * step + shift[:, 0])[:, None, None]
        cy = ((cell // GRID + 0.5) * step + shift[:, 1])[:, None, None]
        turn = ((2 * look[:, j, 3] - 1) * 0.2)[:, None, None]
        cos, sin = torch.cos(turn), torch.sin(turn)
        u, v = x - cx, y - cy
        distance = _shape_distance(on["shape"][:, j], cos * u + sin * v, cos * v - sin * u, r)
        su, sv = u - 3, v - 4
        shadow = _shape_distance(on["shape"][:, j], cos * su + sin * sv, cos * sv - sin * su, r)
        present = (j < on["count"])[:, None, None]
        shade = 0.35 * torch.sigmoid(-shadow / 2) * present
        picture = picture * (1 - shade[:, None])
        cover = ((0.5 - distance).clamp(0, 1) * present)[:, None]
        light = 1 - 0.10 * (u + v) / r - 0.12 * torch.sigmoid((distance + 2.5) * 2)
        body = palette[on["colour"][:, j]][:, :, None, None] * light[:, None]
        picture = picture * (1 - cover) + body * cover
    return picture.clamp(0, 1) * 2 - 1
