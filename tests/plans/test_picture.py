from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from plans.errors import ArrowheadError
from plans.picture import plan_picture
from plans.plan import dense_plan
from tests.tiny import random_plan, tiny_flux, tiny_sd3


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_png_shows_every_mode(make: object, tmp_path: Path) -> None:
    plan = random_plan(make(), steps=12)  # type: ignore[operator]
    plan_picture(plan, tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as picture:
        colours = dict((c, n) for n, c in picture.convert("RGB").getcolors(1 << 20))
    for shade in ((0xE9, 0xE4, 0xD8), (0x1F, 0x3A, 0x5F)):  # cached and full
        assert colours.get(shade, 0) > 1000
    assert min(picture.size) > 300


def test_svg_says_what_the_plan_is(tmp_path: Path) -> None:
    plan = dense_plan(random_plan(tiny_sd3()))
    plan = replace(plan, model=replace(plan.model, source="models/tiny-sd3"))
    plan_picture(plan, tmp_path / "one.svg")
    plan_picture(plan, tmp_path / "two.svg")
    text = (tmp_path / "one.svg").read_text()
    assert "tiny-sd3, 96 x 64" in text and "0.0 % of attention saved over 6 steps" in text
    assert text == (tmp_path / "two.svg").read_text()


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArrowheadError, match="got .gif; expected .png or .svg"):
        plan_picture(random_plan(tiny_sd3()), tmp_path / "plan.gif")
