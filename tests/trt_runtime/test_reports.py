"""What bench, inspect, doctor and the parity gate report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plans.errors import ArrowheadError
from tests.trt_runtime.conftest import Made
from trt_runtime import bench, doctor
from trt_runtime.cli import main
from trt_runtime.inspection import inspect_bundle
from trt_runtime.parity import _parity, max_abs_difference
from trt_runtime.plan_text import mode_counts
from trt_runtime.verify import load_accuracy, picture_quality

Bundles = Callable[[str], Made]


def test_a_nan_never_passes() -> None:
    good = {"sample": torch.ones(3)}
    bad = {"sample": torch.tensor([1.0, math.nan, 1.0])}
    assert _parity(0, good, good, 1e-3).passed
    assert not _parity(0, good, bad, 1e-3).passed
    assert max_abs_difference(good["sample"], bad["sample"]) == math.inf


def test_the_worst_tensor_is_named_relative_to_its_size() -> None:
    expected = {"sample": torch.full((2,), 100.0), "cache_out.a.0": torch.zeros(2)}
    got = {"sample": torch.full((2,), 100.05), "cache_out.a.0": torch.full((2,), 2e-3)}
    row = _parity(1, expected, got, 1e-3)
    assert (row.tensor, row.passed) == ("cache_out.a.0", False)


def test_picture_quality() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    a = Image.fromarray(noise)
    b = Image.fromarray(noise // 2)
    assert picture_quality(a, a) == (100.0, 1.0)
    psnr, ssim = picture_quality(a, b)
    assert psnr < 15
    assert ssim < 0.95


def test_accuracy_callable_is_found_or_explained() -> None:
    assert load_accuracy("math:sqrt") is math.sqrt
    for name in ("math:nothing", "no_such_module:f", "math"):
        with pytest.raises(ArrowheadError, match="--accuracy .* package.module:function"):
            load_accuracy(name)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_bench_reports_both_and_where_they_ran(
    kind: str, torch_bundle: Bundles, prompts_without_encoders: None
) -> None:
    folder, _, plan = torch_bundle(kind)
    report = bench.end_to_end(folder, ["a cat"], backend="torch", repeats=1, warmup=0)
    assert sum(report["plan"]["step_counts"].values()) == plan.steps
    assert report["dense"]["step_counts"] == {"0": plan.steps}
    assert report["speedup"] == report["dense"]["seconds"] / report["plan"]["seconds"]
    assert report["plan_sha256"] == plan.sha256
    assert report["versions"]["torch"]
    json.dumps(report)


def test_run_and_bench_and_inspect_on_the_command_line(
    torch_bundle: Bundles,
    prompts_without_encoders: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(torch_bundle("flux")[0])
    out = tmp_path / "out" / "p.png"
    prompts = ["--prompt", "a cat", "--prompt", "a dog", "--backend", "torch"]
    assert main(["run", folder, *prompts, "--output", str(out)]) == 0
    assert Image.open(out.with_name("p-1.png")).size == (96, 64)
    assert "attention saved by the plan" in capsys.readouterr().out
    target = tmp_path / "bench.json"
    assert main(["bench", "e2e", folder, *prompts, "--repeats", "1", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["dtype"] == "float32"
    assert "speed-up" in capsys.readouterr().out
    assert main(["inspect", folder]) == 0
    assert "bucket_2.onnx" in capsys.readouterr().out
    assert main(["inspect", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch"] == 1


def test_run_refuses_other_steps_and_can_run_dense(
    torch_bundle: Bundles,
    prompts_without_encoders: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["run", str(torch_bundle("sd3")[0]), "--prompt", "a cat", "--backend", "torch",
               "--num-inference-steps", "3", "--output", str(tmp_path / "p.png")]  # fmt: skip
    assert main(command) == 2
    assert "denoising steps" in capsys.readouterr().err
    assert main([*command, "--on-mismatch", "dense"]) == 0
    printed = capsys.readouterr()
    assert "warning: denoising steps" in printed.err
    assert "saved by the plan: 0.0 % over 3 steps" in printed.out


def test_inspection_counts(torch_bundle: Bundles) -> None:
    folder, bundle, plan = torch_bundle("sd3")
    report = inspect_bundle(folder)
    heads = sum(module.heads for module in plan.modules)
    for bucket in range(len(plan.buckets)):
        assert sum(mode_counts(plan, bucket).values()) == heads
    assert report["cache_bytes"] == sum(4 * math.prod(g.shape) for g in bundle.cache_groups)
    assert report["weights_shared"] == 0


def test_doctor_never_fails(capsys: pytest.CaptureFixture[str]) -> None:
    findings = doctor.examine()
    assert all(finding.install for finding in findings if not finding.ok)
    assert next(f for f in findings if f.subject == "Python").ok
    assert main(["doctor"]) == 0
    assert "ONNX Runtime CPU" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(findings)


def test_missing_prompt_file_is_explained(
    torch_bundle: Bundles, prompts_without_encoders: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(torch_bundle("sd3")[0])
    command = ["run", folder, "--prompts", "absent.txt", "--backend", "torch"]
    assert main(command) == 2
    assert "prompts absent.txt | got No such file" in capsys.readouterr().err
