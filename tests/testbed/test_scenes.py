"""Scenes: said and understood alike, the same on every machine, and never both learnt and asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.testbed import scenes
from tests.testbed.evaluate import held_out_captions
from tests.testbed.scenes import Scenes

TRAINING_SCENES = 120_000  # as many as `train` draws, with the same seed


def test_captions_are_understood_as_they_are_meant() -> None:
    drawn, kinds = scenes.sample_scenes(2000, seed=3), set()
    for i in range(len(drawn)):
        stated = scenes.facts(drawn, i)
        kinds |= {fact.kind for fact in stated} | {f.value for f in stated if f.kind == "relation"}
        said = scenes.caption(stated)
        assert scenes.parse_caption(said) == stated, said
    everything = {"size", "colour", "shape", "place", "relation", "texture", "ground", "count"}
    assert kinds == everything | set(range(len(scenes.RELATIONS)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a huge red ring at the center, on a plain tan ground",
        "a large red ring beside the blue star, on a plain tan ground",
        "a small red ring left of the blue star, on a plain tan ground",
    ],
)
def test_other_texts_are_no_captions(text: str) -> None:
    with pytest.raises(ValueError):
        scenes.parse_caption(text)


def test_a_seed_is_a_picture() -> None:
    drawn = scenes.sample_scenes(3, seed=4)
    pictures = scenes.render(drawn)
    assert torch.equal(scenes.render(scenes.sample_scenes(3, seed=4)), pictures)
    assert torch.equal(scenes.render(drawn.take([1])), pictures[1:2])
    assert not torch.equal(scenes.render(scenes.sample_scenes(3, seed=5)), pictures)
    assert pictures.shape == (3, 3, scenes.SIDE, scenes.SIDE) and pictures.abs().max() <= 1
    assert held_out_captions(1) == [
        "a small red star at the top center, a large white circle at the center, "
        "on a striped gray ground"
    ]


def combinations(drawn: Scenes) -> list[tuple[object, ...]]:
    """All that a caption can state of each scene, whatever the order and the wording."""
    kinds = np.stack([drawn.colour, drawn.shape, drawn.size, drawn.cell], -1).tolist()
    return [
        (frozenset(map(tuple, objects[:count])), texture, ground)
        for objects, count, texture, ground in zip(
            kinds, drawn.count, drawn.texture, drawn.ground, strict=True
        )
    ]


def test_held_out_combinations_are_never_learnt() -> None:
    learnt = combinations(scenes.sample_scenes(TRAINING_SCENES, seed=0))
    asked = combinations(scenes.sample_scenes(8000, seed=5, held_out=True))
    assert len(learnt) == TRAINING_SCENES and len(asked) == 8000
    assert not set(learnt) & set(asked)
