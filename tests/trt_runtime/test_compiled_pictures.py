"""Whole pictures of the trained pipelines from prepared weights, straight from plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.testbed.models import TESTBED, missing
from tests.trt_runtime.testbed_pictures import CAPTION, LIBRARY, both, error
from trt_runtime.cli import main

PIPELINES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(missing(name)), reason=str(missing(name))))
    for name in ("tiny-sd3", "tiny-flux")
]


@pytest.mark.parametrize("name", PIPELINES)
def test_prepared_weights_draw_what_the_processors_draw(name: str) -> None:
    plain, ours, images = both(name, device="cpu", dtype=torch.float32, compile="none")
    assert error(ours[0], plain[0]) < 1e-5
    assert torch.equal(ours[1], ours[0])  # nothing of the first picture is left
    pixels = [np.asarray(image, dtype=int) for image in images]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1 and pixels[0].std() > 10


@pytest.mark.skipif(bool(missing("tiny-sd3")), reason="tiny-sd3 is not saved")
def test_the_command_draws_from_a_plan_without_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, target = str(LIBRARY / "tiny-sd3.json"), str(tmp_path / "circle.png")
    assert main(["run", "--plan", plan, "--prompt", CAPTION, "--output", target]) == 0
    assert Path(target).read_bytes()[:4] == b"\x89PNG"
    assert "attention saved by the plan: 5" in capsys.readouterr().out
    assert main(["run", "--prompt", CAPTION]) == 2
    assert main(["run", str(tmp_path), "--plan", plan, "--prompt", CAPTION]) == 2
    assert main(["run", "--plan", plan, "--backend", "onnxruntime", "--prompt", CAPTION]) == 2
    flux = str(TESTBED / "tiny-flux")
    if not missing("tiny-flux"):
        assert main(["run", "--plan", plan, "--model", flux, "--prompt", CAPTION]) == 2
