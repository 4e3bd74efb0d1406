"""The reader: a drawn picture is right, and one changed fact is wrong and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.testbed import reader, scenes
from tests.testbed.scenes import GRID, Scenes

OF_AN_OBJECT = {"size", "colour", "shape", "place", "relation"}
# What is wrong once a kind of fact is changed: an object of another colour is not found at all.
SPOILED = {
    "size": {"size"},
    "shape": {"shape"},
    "where": {"place", "relation"},
    "texture": {"texture"},
    "ground": {"ground"},
    "colour": OF_AN_OBJECT,
    "count": OF_AN_OBJECT | {"count"},
}


@pytest.fixture(scope="module")
def drawn() -> Scenes:
    return scenes.sample_scenes(16, seed=6, held_out=True)


def another_place(drawn: Scenes, i: int) -> int:
    """A free place where what is said of the last object's place does not hold."""
    where = next(f for f in reversed(scenes.facts(drawn, i)) if f.kind in SPOILED["where"])
    free = sorted(set(range(GRID * GRID)) - set(drawn.cell[i, : drawn.count[i]].tolist()))
    if where.kind == "place":
        return free[0]
    row, col = divmod(int(drawn.cell[i, where.other]), GRID)
    contrary = (  # by relation
        lambda r, c: c >= col,
        lambda r, c: c <= col,
        lambda r, c: r >= row,
        lambda r, c: r <= row,
    )[where.value]
    return next(cell for cell in free if contrary(*divmod(cell, GRID)))


def change(drawn: Scenes, kind: str) -> Scenes:
    """The same scenes with one fact of the last object, or of the ground, made another."""
    other = drawn.take(np.arange(len(drawn)))
    for i, count in enumerate(drawn.count):
        last = count - 1
        if kind == "count":
            other.count[i] = last
        elif kind == "where":
            other.cell[i, last] = another_place(drawn, i)
        elif kind == "colour":
            unused = set(range(len(scenes.COLOURS))) - set(drawn.colour[i].tolist())
            other.colour[i, last] = min(unused)
        elif kind in reader.PER_PICTURE:
            getattr(other, kind)[i] = (getattr(drawn, kind)[i] + 1) % reader.PER_PICTURE[kind]
        else:
            kinds = {"size": len(scenes.SIZES), "shape": len(scenes.SHAPES)}[kind]
            getattr(other, kind)[i, last] = (getattr(drawn, kind)[i, last] + 1) % kinds
    return other


@pytest.mark.parametrize("kind", SPOILED)
def test_one_changed_fact_is_wrong(drawn: Scenes, kind: str) -> None:
    captions = [scenes.caption(scenes.facts(drawn, i)) for i in range(len(drawn))]
    marks = reader.verdicts(captions, scenes.render(change(drawn, kind)))
    for i, holds in enumerate(marks):
        stated, last = scenes.facts(drawn, i), drawn.count[i] - 1
        wrong = [fact for fact, right in zip(stated, holds, strict=True) if not right]
        assert wrong == [f for f in stated if f.kind in SPOILED[kind] and f.subject in (-1, last)]


def test_score_of_pictures(drawn: Scenes) -> None:
    captions = [scenes.caption(scenes.facts(drawn, i)) for i in range(len(drawn))]
    pictures = ((scenes.render(drawn) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(picture) for picture in pictures]
    right = reader.score(captions, images)
    assert set(right.values()) == {1.0} and right.keys() > {"accuracy", "relation", "count"}
    swapped = reader.score(captions, images[1:] + images[:1])
    assert swapped["accuracy"] < 0.5 and swapped["captions_right"] == 0
