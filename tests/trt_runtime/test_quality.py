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
from PIL import Image
from torch import Tensor

from plans.errors import ArrowheadError
from plans.plan import load_plan
from plans.search import measure
from plans.tiles import FULL
from tests import tiny
from tests.trt_runtime.conftest import Made
from trt_runtime import quality_page
from trt_runtime.cli import parser
from trt_runtime.cli_quality import load_callable
from trt_runtime.marks import RESAMPLES, Judge, paired_interval, picture_likeness
from trt_runtime.pipeline import load_source_pipeline
from trt_runtime.quality import measure_quality
from trt_runtime.quality_draw import Artist, Drawn
from trt_runtime.quality_page import write_page
from trt_runtime.quality_peers import missing_peers
from trt_runtime.quality_report import CAPTIONS, RESULTS, table
from trt_runtime.quality_settings import VARIANTS, Settings, points
from trt_runtime.verify import picture_quality

Bundles = Callable[[str], Made]
MEASURED = {"draw_seconds", "transformer_ms_per_picture", "transformer_ms_per_step"}
TEXTS = [f"picture {i}" for i in range(5)]


def captions(count: int) -> list[str]:
    return TEXTS[:count]


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
            captions=tuple(TEXTS), calibration=("another",), steps=4, height=tiny.HEIGHT,
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
    latents = torch.tensor([1.0, 1.0 + value])  # after two steps
    return Drawn(pictures, latents[None, :, None].expand(2, 2, 4), 0.0)


def test_marks_of_likeness() -> None:
    marks, by_caption = Judge(["a", "b"], drawn()).marks(drawn(1))
    assert marks["latent_relative_error"] == pytest.approx(1)
    assert marks["latent_error_per_step"] == pytest.approx([0, 1])
    assert by_caption["psnr_db"] == pytest.approx([marks["psnr_db"]] * 2)
    assert marks["psnr_db"] == pytest.approx(20 * np.log10(255))
    assert 0 < marks["ssim"] < 1
    assert "accuracy" not in marks


def test_likeness_is_that_of_scikit_image() -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(0, 256, (3, 3, 24, 40), generator=generator, dtype=torch.uint8)
    b = (a.float() * 0.7 + 20 * torch.rand(a.shape, generator=generator)).to(torch.uint8)
    b[2] = a[2]
    images = [[Image.fromarray(x) for x in y.permute(0, 2, 3, 1).numpy()] for y in (a, b)]
    expected = [picture_quality(*pair) for pair in zip(*images, strict=True)]
    psnr, ssim = picture_likeness(a, b)
    assert psnr.tolist() == pytest.approx([x for x, _ in expected], rel=1e-5)
    assert ssim.tolist() == pytest.approx([x for _, x in expected], abs=1e-5)


def test_seeds_of_a_caption_are_marked_together() -> None:
    """Facts right: captions a, b with seed 0, then with seed 1."""
    answers = iter([[[True, False], [True, True]] * 2, [[True, True], [True, True]] * 2])
    dense = Drawn(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.ones(4, 1, 2), 0.0)
    judge = Judge(["a", "b"], dense, verdicts=lambda c, p: next(answers))
    marks, by_caption = judge.marks(dense)
    assert judge.dense_by_caption == {"right": [2, 4], "facts": [4, 4]}
    assert by_caption["right"] == [4, 4] and marks["facts"] == 8
    assert marks["difference_points"] == 25 and marks["captions_right"] == 1
    assert marks["interval_points"] == [0, 50]


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
    one, all_ = (Artist(pipe, base_settings(batch=b, seeds=2), ()).draw(3) for b in (1, 5))
    assert one.pictures.shape == (10, 3, tiny.HEIGHT, tiny.WIDTH)
    assert one.latents.shape[:2] == (10, 3)
    torch.testing.assert_close(one.latents, all_.latents, rtol=1e-4, atol=1e-4)
    assert (one.latents[0, -1] - one.latents[1, -1]).abs().max() > 0.1  # another caption
    assert (one.latents[0, -1] - one.latents[5, -1]).abs().max() > 0.1  # another seed
    assert len(one.step_ms) == 3 and min(one.step_ms) > 0


def test_points() -> None:
    settings = base_settings(
        variants=("cache", "arrow", "steps", "first-block-cache", "stacked"), fewer_steps=(),
        steps=16, thresholds=(0.2,),
    )  # fmt: skip
    names = [point.name for point in points(settings)]
    assert names[:3] == ["cache, delta 0", "arrow, delta 0", "cache, delta 0.5"]
    assert names[4:9] == ["14 steps", "12 steps", "10 steps", "8 steps", "6 steps"]
    assert names[9:] == ["first-block-cache, threshold 0.2", "stacked, delta 0.5, threshold 0.2"]
    several = replace(settings, variants=("stacked",), stacked_deltas=(0.1, 0.3))
    assert [point.delta for point in points(several)] == [0.1, 0.3]


def test_rows(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings()
    report = measure_quality(pipe, settings, tmp_path, verdicts=verdicts)
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
    assert len(half["latent_error_per_step"]) == 4 and one["latent_error_per_step"] is None
    assert half["latent_error_per_step"][0] < 1e-4 < half["latent_error_per_step"][-1]
    assert report["settings"]["calibration_seed"] == 12
    assert all(len(row) == 11 for row in table(report))
    by_caption = json.loads((tmp_path / CAPTIONS).read_text())
    assert sum(by_caption["1 steps"]["right"]) / 20 == one["accuracy"]


def test_layerwise_plans_keep_their_bound(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings(variants=("layer",), deltas=(0.8,))
    row = measure_quality(pipe, settings, tmp_path)["rows"][0]
    plan = load_plan(tmp_path / row["plan"])
    chosen = [modes for step in range(4) for modes in plan.modes_at(step).values()]
    assert all(len(set(modes)) == 1 for modes in chosen)
    assert row["attention_flops_saved"] > 0 and set(plan.modes_at(0).values()) == {(FULL,) * 4}
    errors = measure(pipe, plan, settings.calibration, seed=settings.calibration_seed)
    assert max(sum(heads) for step in errors for heads in step.values()) <= 0.8 + 1e-6


def test_a_scorer_alone_gives_numbers(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings(variants=("steps",), fewer_steps=(1,))
    report = measure_quality(pipe, settings, tmp_path, accuracy=score)
    assert report["rows"][0]["scores"] == {"accuracy": 0.5, "pictures": 5.0}
    assert report["rows"][0]["accuracy"] == 0.5


def test_a_limit_leaves_rows_for_later(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings(variants=("steps",))
    report = measure_quality(pipe, settings, tmp_path, verdicts=verdicts, limit_seconds=0)
    assert report["rows"] == [] and report["uncompressed"]["facts"] == 20
    write_page(report, tmp_path / "page.html")  # says as much
    assert "uncompressed" in (tmp_path / "page.html").read_text()
    report = measure_quality(pipe, settings, tmp_path, verdicts=verdicts, resume=True)
    assert [row["steps"] for row in report["rows"]] == [3, 1]


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
        assert {k: v for k, v in row.items() if k not in MEASURED} == {
            k: v for k, v in other.items() if k not in MEASURED
        }
    untouched = (tmp_path / "a" / RESULTS).read_bytes()
    measure_quality(pipe, settings, tmp_path / "a", resume=True, verdicts=verdicts)
    assert (tmp_path / "a" / RESULTS).read_bytes() == untouched


def test_plans_are_searched_once(pipe: Any, tmp_path: Path) -> None:
    settings = base_settings(deltas=(0.5,), variants=("both",))
    both = measure_quality(pipe, settings, tmp_path, verdicts=verdicts)["rows"][0]
    seen: list[str] = []
    more = replace(settings, variants=("both", "random"))
    report = measure_quality(
        pipe, more, tmp_path, verdicts=verdicts, resume=True,
        progress=lambda what, *_: seen.append(what),
    )  # fmt: skip
    assert not [what for what in seen if "search" in what]
    first, random = report["rows"]
    assert first == both and random["plan_sha256"] != both["plan_sha256"]
    # Where a module discards its text rows a head keeps fewer pairs: the costs differ a little.
    shares = [row["attention_flops_saved"] for row in (random, both)]
    assert shares[0] == pytest.approx(shares[1], rel=0.05)


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
        ({"variants": ("all",)}, r"variants \| got \['all'\]; expected some of both, priced"),
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
            "--deltas", "0.5", "--thresholds", "0.3",
            "--num-calibration-prompts", "1", "--output", str(tmp_path / "out"),
        ]
    )  # fmt: skip
    assert arguments.run(arguments) == 0
    report = json.loads((tmp_path / "out" / RESULTS).read_text())
    variants = [row["variant"] for row in report["rows"]]
    assert set(variants) == set(VARIANTS) - {"priced", *missing_peers()}
    assert all("interval_points" in row for row in report["rows"])
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    page = (tmp_path / "out" / "quality.html").read_text()
    assert page.count("<svg") == 5 and "src=" not in page and 'href="http' not in page
    printed, progress = capsys.readouterr()
    assert f"1/{len(variants) + 1}  both, delta 0.5\n" in progress
    (tmp_path / "out" / "curves.png").unlink()
    assert quality_page.main([str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "curves.png").exists()
    assert quality_page.main([str(tmp_path)]) == 2
    skipped = missing_peers() | {"priced": "no prices: pass --prices on a GPU"}
    for name, why in skipped.items():
        assert f"skipped {name}: {why}" in printed and name in page
    assert all(row["name"] in page for row in report["rows"])
