"""bench e2e of architectures, and plan synthetic, with tiny models on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plans import architectures
from plans.architectures import ARCHITECTURES, Architecture
from plans.plan import load_plan
from plans.synthetic import Mix
from trt_runtime import bench_steps
from trt_runtime.bench_steps import measure_steps
from trt_runtime.cli import main
from trt_runtime.random_models import random_inputs, random_transformer
from trt_runtime.step_baselines import Baselines
from trt_runtime.step_profile import CLASSES, classify, draw_classes
from trt_runtime.step_runners import BACKENDS, Runner, Settings, seconds_of_picture

SD3, FLUX = "sd3.5-medium", "flux.1-dev"


def tiny(name: str) -> Architecture:
    """The architecture with few small heads and short text."""
    full = ARCHITECTURES[name]
    small: dict[str, Any] = {
        "num_attention_heads": 4, "attention_head_dim": 8, "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
    }  # fmt: skip
    if name == FLUX:
        small["axes_dims_rope"] = [2, 2, 4]
    else:
        small["caption_projection_dim"] = 32
    return replace(full, config={**full.config, **small}, text_tokens=5).of_depth(2)


@pytest.fixture(params=[SD3, FLUX])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Architecture:
    made = tiny(request.param)
    monkeypatch.setitem(architectures.ARCHITECTURES, made.name, made)
    return made


def settings(**changes: Any) -> Settings:
    base = Settings(
        256, 256, baselines=("eager",), device="cpu", dtype=torch.float32,
        block=16, rounds=2, repeats=1,
    )  # fmt: skip
    return replace(base, **changes)


def test_random_weights_give_finite_and_different_samples(architecture: Architecture) -> None:
    model = random_transformer(architecture, device="cpu", dtype=torch.float32)
    bench = bench_steps.Workbench(architecture, settings(baselines=()), print)
    inputs = [
        random_inputs(architecture, bench.plan(()), device="cpu", dtype=torch.float32, seed=seed)
        for seed in (0, 1)
    ]
    with torch.no_grad():
        first, second = (model(**given, return_dict=False)[0] for given in inputs)
    assert first.shape[0] == architecture.rows
    assert torch.isfinite(first).all() and not torch.equal(first, second)


def test_rows_hold_both_sides_and_pictures(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpruned = "torch-compile-unpruned"
    monkeypatch.setitem(BACKENDS, unpruned, {**BACKENDS[unpruned], "compiler": "aot_eager"})
    partial: list[int] = []
    report = measure_steps(
        architecture,
        [(backend, mix) for mix in ((Mix(1, 2, 1, 1),), ()) for backend in ("torch", unpruned)],
        settings(loop=True, profile=True),
        row_done=lambda report: partial.append(len(report["rows"])),
    )
    assert not report["failures"]
    assert partial == [0, 1, 2, 3, 4]  # written after each row
    assert [(row["backend"], row["mix"]) for row in report["rows"]] == [
        (backend, mix) for mix in ("1/2x1/1", "dense") for backend in ("torch", unpruned)
    ]
    for row in report["rows"]:
        assert row["finite"] and row["ms"] > 0 and row["baselines_ms"]["eager"] > 0
        expected = (row["full_step_ms"] + 27 * row["ms"]) / 1000
        assert row["picture_seconds"]["28"] == pytest.approx(expected)
        assert sum(row["classes_ms"].values()) == pytest.approx(row["ms"])
        kernels = row["kernels"]
        assert kernels[0]["ms"] >= kernels[-1]["ms"] > 0 and kernels[0]["calls"] >= 1
        assert sum(kernel["ms"] for kernel in kernels) <= row["ms"] * (1 + 1e-6)
    assert report["rows"][0]["loop_seconds"] > 0 and report["rows"][0]["cache_bytes"] > 0
    assert "classes_ms" in report["baselines"][0]


def test_a_sample_is_looked_at_before_the_next_run_overwrites_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As CUDA graphs do, also those of torch.compile's max-autotune."""
    made: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        for before in made:
            before.fill_(torch.nan)
        made.append(torch.ones(2))
        return made[-1]

    monkeypatch.setattr(Baselines, "runner", lambda self, name: Runner(name, run, run))
    report = measure_steps(tiny(SD3), [], settings())
    assert report["baselines"][0]["finite"] and not report["failures"]


def test_a_row_that_fails_is_told_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "broken", {"compile": "layers"})
    report = measure_steps(
        tiny(SD3), [("broken", ()), ("torch", ())], settings(baselines=(), full_step=False)
    )
    assert [failure["row"] for failure in report["failures"]] == ["broken, dense"]
    assert [row["backend"] for row in report["rows"]] == ["torch"]


def test_the_command_writes_table_json_and_picture(
    architecture: Architecture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the command takes the GPU where there is one, and tiny heads fit no kernel")
    code = main(
        ["bench", "e2e", "--architecture", architecture.name, "--height", "256", "--width", "256",
         "--block", "16", "--mix", "1/2x1/1:torch", "1/1x1/2+1/2x1/1:torch", "--baseline", "eager",
         "--repeats", "1", "--steps-per-round", "1", "--json", str(tmp_path / "steps.json"),
         "--plot", str(tmp_path / "steps.png")]
    )  # fmt: skip
    assert code == 0
    report = json.loads((tmp_path / "steps.json").read_text())
    assert report["rows"][0]["architecture"] == architecture.name
    assert report["git_commit"] and report["versions"]["torch"] and report["device"]
    assert (tmp_path / "steps.png").read_bytes()[:4] == b"\x89PNG"
    weights = sum(
        w.nbytes
        for w in random_transformer(architecture, device="cpu", dtype=torch.float32).parameters()
    )
    for row, buckets in zip(report["rows"], (1, 2), strict=True):
        assert len(row["buckets_ms"]) == buckets
        assert row["weight_bytes"] >= weights  # buffers too
        assert row["copied_weight_bytes"] == 0 and row["weights_ratio"] == 1
        assert row["measured_weights_ratio"] is None  # the device is not asked
    first, second = report["rows"][1]["buckets_ms"]
    assert min(first, second) <= report["rows"][1]["ms"] <= max(first, second)
    shown = capsys.readouterr().out
    assert "1/2x1/1" in shown and "1.000x" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "e2e"],
        ["bench", "e2e", "bundle", "--architecture", SD3],
        ["bench", "e2e", "--architecture", "sdxl"],
        ["bench", "e2e", "--architecture", SD3, "--variant", "fast"],
        ["bench", "e2e", "--architecture", SD3, "--baseline", "slow"],
        ["bench", "e2e", "--architecture", SD3, "--mix", "1/1/1"],
        ["bench", "e2e", "--architecture", SD3, "--mix", "7/8x4/9:fast"],
        ["bench", "e2e", "--architecture", SD3, "--mix", "7/8x4/9+dense"],
    ],
)
def test_what_cannot_be_timed_is_refused(arguments: list[str]) -> None:
    assert main(arguments) == 2


def test_plan_synthetic_writes_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    code = main(
        ["plan", "synthetic", "--architecture", SD3, "--mix", "7/8x4/9", "--model", "org/sd3",
         "--num-inference-steps", "5", "--output", str(target)]
    )  # fmt: skip
    assert code == 0
    plan = load_plan(target)
    assert plan.model.source == "org/sd3" and plan.schedule == (0, 1, 1, 1, 1)
    assert "nothing was measured" in capsys.readouterr().out
    cut = ["plan", "synthetic", "--architecture", FLUX, "--cut", "0.5", "--output", str(target)]
    assert main(cut) == 0
    assert load_plan(target).search["mixes"] == ["11 full + 8 hw4 + 5 cached"]


def test_a_picture_is_one_full_step_and_the_others() -> None:
    assert seconds_of_picture(28, 100.0, 200.0) == pytest.approx(2.9)
    assert seconds_of_picture(28, 100.0, None) is None


@pytest.mark.parametrize(
    ("kernel", "shapes", "expected"),
    [
        ("void arrowhead::sm90::attention_kernel<...>", [], {"attention": 1.0}),
        ("nvjet_tst_256x128_64x4", [[3072], [16896, 3072], [3072, 3072]], {"projections": 1.0}),
        ("sm90_xmma_gemm_bf16", [[12288], [16896, 3072], [3072, 12288]], {"MLP": 1.0}),
        ("nvjet_tst", [[16896, 12288], [12288, 3072]], {"MLP": 1.0}),
        ("nvjet_tst", [], {"other": 1.0}),
        ("nvjet_tst", [[16896, 14592], [14592, 3072]],
         {"MLP": 12288 / 14592, "projections": 1 - 12288 / 14592}),
        ("triton_red_fused_native_layer_norm_3", [], {"norms and elementwise": 1.0}),
        ("triton_poi_fused_cat_1", [], {"copies": 1.0}),
        ("Memcpy DtoD (Device -> Device)", [], {"copies": 1.0}),
        ("something", [], {"other": 1.0}),
    ],
)  # fmt: skip
def test_kernels_are_classed(
    kernel: str, shapes: list[list[int]], expected: dict[str, float]
) -> None:
    assert classify(kernel, shapes, 3072) == pytest.approx(expected)
    assert set(expected) <= set(CLASSES)


def test_the_picture_of_classes_needs_rows_with_them(tmp_path: Path) -> None:
    row = {"backend": "eager", "mix": "dense", "classes_ms": dict.fromkeys(CLASSES, 1.0)}
    draw_classes([row, {"backend": "torch", "mix": "dense"}], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
