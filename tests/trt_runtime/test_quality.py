"""The curve of quality against saving: its statistics, its rows, and runs that are taken up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plans.errors import ArrowheadError
from plans.plan import load_plan
from tests import tiny
from tests.trt_runtime.conftest import Made
from trt_runtime.cli import parser
from trt_runtime.cli_quality import load_callable
from trt_runtime.marks import RESAMPLES, Drawn, Judge, paired_interval
from trt_runtime.pipeline import load_source_pipeline
from trt_runtime.quality import draw, measure_quality
from trt_runtime.quality_report import RESULTS, table
from trt_runtime.quality_settings import Settings, points

Bundles = Callable[[str], Made]
CAPTIONS = [f"picture {i}" for i in range(5)]


def captions(count: int) -> list[str]:
    return CAPTIONS[:count]


def score(captions: list[str], pictures: list[Any]) -> dict[str, float]:
    return {"accuracy": 0.5, "white": float("nan"), "pictures": len(pictures)}


def verdicts(captions: list[str], pictures: Tensor) -> list[list[bool]]:
    """Say of each quarter of a picture, as a fact, whether its mean is above the grey."""
    assert -1 <= pictures.min() and pictures.max() <= 1
    quarters = pictures.mean(1).flatten(1).unflatten(1, (4, -1)).mean(2)
    return (quarters > 0).tolist()


def base_settings(**changes: Any) -> Settings:
    return Settings(
        **dict(
            captions=tuple(CAPTIONS), calibration=("another",), steps=4, height=tiny.HEIGHT,
            width=tiny.WIDTH, guidance_scale=4.0, block=tiny.BLOCK, deltas=(0.0, 0.5),
            variants=("both", "steps"), fewer_steps=(3, 1), batch=2, seed=7,
        )
        | changes
    )  # fmt: skip


@pytest.fixture
def pipe(torch_bundle: Bundles, prompts_without_encoders: None) -> Any:
    folder, _, _ = torch_bundle("sd3")
    return load_source_pipeline(str(folder.parent / "model"), dtype=torch.float32)


def test_interval_is_the_bootstrap_over_captions() -> None:
    rng = np.random.default_rng(1)
    facts = rng.integers(1, 9, 40)
    right, before = rng.integers(0, facts + 1), rng.integers(0, facts + 1)
    found = paired_interval(right, before, facts, seed=3)
    picks = np.random.default_rng(3).integers(0, 40, (RESAMPLES, 40))
    shares = [100 * sum(right[p] - before[p]) / sum(facts[p]) for p in picks]
    assert [found.low, found.high] == pytest.approx(list(np.percentile(shares, [2.5, 97.5])))
    assert found.difference == pytest.approx(100 * (right.sum() - before.sum()) / facts.sum())
    assert found.low < found.difference < found.high
    assert found == paired_interval(right, before, facts, seed=3)


def test_interval_is_paired() -> None:
    same = paired_interval([3, 0, 4], [3, 0, 4], [4, 4, 4])
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    shifted = paired_interval([3, 0, 4], [2, -1, 3], [4, 4, 4])  # noise of captions cancels
    assert (shifted.difference, shifted.low, shifted.high) == (25, 25, 25)


def drawn(value: int = 0) -> Drawn:
    pictures = torch.full((2, 3, 32, 32), value, dtype=torch.uint8)
    return Drawn(pictures, torch.full((2, 4), 1.0 + value), 0.0)


def test_marks_of_likeness() -> None:
    marks = Judge(["a", "b"], drawn()).marks(drawn(1))
    assert marks["latent_relative_error"] == pytest.approx(1)
    assert marks["psnr_db"] == pytest.approx(20 * np.log10(255))
    assert 0 < marks["ssim"] < 1
    assert "accuracy" not in marks


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda c, p: [[True]], r"verdicts \| got 1 rows for 2 captions"),
        (lambda c, p: [[], []], "got no fact in 2 captions"),
        (lambda c, p: [[True] * (1 + int(p.max() > -1))] * 2, "got another number of facts"),
    ],
)
def test_verdicts_that_cannot_be_used(answer: Any, message: str) -> None:
    with pytest.raises(ArrowheadError, match=message):
        Judge(["a", "b"], drawn(), verdicts=answer).marks(drawn(9))


def test_a_picture_does_not_depend_on_its_batch(pipe: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    one, all_ = (draw(pipe, base_settings(batch=batch), 3) for batch in (1, 5))
    assert one.pictures.shape == (5, 3, tiny.HEIGHT, tiny.WIDTH)
    torch.testing.assert_close(one.latents, all_.latents, rtol=1e-4, atol=1e-4)
    assert (one.latents[0] - one.latents[1]).abs().max() > 0.1


def test_points() -> None:
    settings = base_settings(variants=("cache", "arrow", "steps"), fewer_steps=(), steps=16)
    names = [point.name for point in points(settings)]
    assert names[:3] == ["cache, delta 0", "arrow, delta 0", "cache, delta 0.5"]
    assert names[4:] == ["14 steps", "12 steps", "10 steps", "8 steps", "6 steps"]


def test_rows(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings()
    report = measure_quality(pipe, settings, tmp_path, accuracy=score, verdicts=verdicts)
    assert json.loads((tmp_path / RESULTS).read_text()) == report
    full, half, three, one = report["rows"]
    assert full["attention_flops_saved"] == 0 and full["buckets"] == 1
    assert full["difference_points"] == 0 and full["interval_points"] == [0, 0]
    assert full["latent_relative_error"] < 1e-4 and full["psnr_db"] > 60
    plan = load_plan(tmp_path / half["plan"])
    assert plan.sha256 == half["plan_sha256"]
    assert half["attention_flops_saved"] == plan.accounting["attention_flops_saved"] > 0
    assert 0 < half["transformer_flops_saved"] < half["attention_flops_saved"]
    assert half["psnr_db"] < full["psnr_db"] and half["ssim"] < full["ssim"]
    assert three["transformer_flops_saved"] == 0.25 and one["steps"] == 1
    assert one["latent_relative_error"] > three["latent_relative_error"] > 0
    assert report["uncompressed"]["facts"] == 20
    assert full["scores"] == {"accuracy": 0.5, "pictures": 5.0}
    assert report["settings"]["calibration_seed"] == 12
    assert all(len(row) == 10 for row in table(report))


def test_an_interrupted_run_is_taken_up(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings(variants=("steps",), fewer_steps=(3, 2, 1))

    def stop(what: str, *_: Any) -> None:
        if what.startswith("2 steps"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_quality(pipe, settings, tmp_path / "a", verdicts=verdicts, progress=stop)
    seen: list[str] = []
    report = measure_quality(
        pipe, settings, tmp_path / "a", verdicts=verdicts, resume=True,
        progress=lambda what, *_: seen.append(what.split(":")[0]),
    )  # fmt: skip
    assert sorted(set(seen)) == ["1 steps", "2 steps", "uncompressed"]
    whole = measure_quality(pipe, settings, tmp_path / "b", verdicts=verdicts)
    for row, other in zip(report["rows"], whole["rows"], strict=True):
        assert {**row, "draw_seconds": 0} == {**other, "draw_seconds": 0}
    untouched = (tmp_path / "a" / RESULTS).read_bytes()
    measure_quality(pipe, settings, tmp_path / "a", resume=True, verdicts=verdicts)
    assert (tmp_path / "a" / RESULTS).read_bytes() == untouched


def test_results_are_neither_overwritten_nor_mixed(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings(variants=("steps",), fewer_steps=(1,))
    measure_quality(pipe, settings, tmp_path)
    with pytest.raises(ArrowheadError, match="already there; .*--resume"):
        measure_quality(pipe, settings, tmp_path)
    with pytest.raises(
        ArrowheadError, match="settings of .* got .*'seed': 8.*expected .*'seed': 7"
    ):
        measure_quality(pipe, replace(settings, seed=8), tmp_path, resume=True)
    (tmp_path / RESULTS).write_text("[")
    with pytest.raises(ArrowheadError, match="JSON of format arrowhead.quality/1"):
        measure_quality(pipe, settings, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("all",)}, r"variants \| got \['all'\]; expected some of both, arrow"),
        ({"captions": ()}, "captions .* expected one or more"),
        ({"calibration": ("picture 1",)}, "prompts that are not marked"),
        ({"fewer_steps": (4,)}, "expected counts in 1..3"),
        ({"batch": 0}, "pictures of one call"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArrowheadError, match=message):
        base_settings(**changes)


def test_a_callable_is_found_or_explained() -> None:
    assert load_callable("--prompts", "math:sqrt", "a function")(4) == 2
    with pytest.raises(ArrowheadError, match="--prompts .* expected package.module:function, a f"):
        load_callable("--prompts", "math:nothing", "a function")


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_command(
    kind: str,
    torch_bundle: Bundles,
    prompts_without_encoders: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(torch_bundle(kind)[0].parent / "model")
    here = "tests.trt_runtime.test_quality"
    arguments = parser().parse_args(
        [
            "bench", "quality", "--model", model,
            "--prompts", f"{here}:captions", "--num-prompts", "3", "--accuracy", f"{here}:score",
            "--num-inference-steps", "3", "--guidance-scale", "4",
            "--height", str(tiny.HEIGHT), "--width", str(tiny.WIDTH), "--block", str(tiny.BLOCK),
            "--deltas", "0.5", "--num-calibration-prompts", "1", "--output", str(tmp_path / "out"),
        ]
    )  # fmt: skip
    assert arguments.run(arguments) == 0
    report = json.loads((tmp_path / "out" / RESULTS).read_text())
    variants = [row["variant"] for row in report["rows"]]
    assert variants == ["both", "arrow", "cache", "steps", "steps"]
    assert all("interval_points" in row for row in report["rows"])
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "cache, delta 0.5" in printed and "2 steps" in printed
