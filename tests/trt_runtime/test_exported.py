"""Exported graphs on ONNX Runtime: parity, shared weights, the gate, the whole command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plans.bundle import load_bundle
from plans.plan import save_plan
from tests.trt_runtime.conftest import Made
from trt_runtime import load_pipeline, load_transformer
from trt_runtime.cli import main
from trt_runtime.parity import compare_graphs
from trt_runtime.pipeline import generate

Bundles = Callable[[str], Made]
KINDS = ["sd3", "flux"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_graph_agrees_with_pytorch(kind: str, onnx_bundle: Bundles) -> None:
    folder, bundle, plan = onnx_bundle(kind)
    rows = compare_graphs(folder, threads=1)
    assert [row.bucket for row in rows] == [*range(len(plan.buckets)), None]
    assert all(row.passed for row in rows), rows
    assert max(row.max_abs for row in rows) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_agrees_with_pytorch(
    kind: str, onnx_bundle: Bundles, prompts_without_encoders: None
) -> None:
    folder, _, _ = onnx_bundle(kind)
    made = {}
    for backend in ("onnxruntime", "torch"):
        pipe = load_pipeline(folder, backend=backend)
        pipe.set_progress_bar_config(disable=True)
        pipe.transformer.state.poison = True
        made[backend] = generate(pipe, ["a cat"], seed=2)[0].latents
    difference = (made["onnxruntime"] - made["torch"]).abs().max()
    assert difference <= 1e-3


def test_sessions_share_one_map_of_the_weights(onnx_bundle: Bundles) -> None:
    proxy = load_transformer(onnx_bundle("sd3")[0], threads=1)
    assert len({id(engine._weights) for engine in proxy.engines.values()}) == 1
    proxy.close()


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of the exports a command asks for; each puts the same bundle there anew."""
    import exporter

    asked: list[dict[str, Any]] = []

    def export_bundle(model: Any, plan: Any, folder: Path, **options: Any) -> Any:
        asked.append(options)
        return load_bundle(folder)

    monkeypatch.setattr(exporter, "export_bundle", export_bundle)
    return asked


def test_build_from_a_plan_exports_only_what_is_not_there(
    onnx_bundle: Bundles,
    exports: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _, plan = onnx_bundle("sd3")
    shutil.copytree(folder, tmp_path / "bundle")
    shutil.copytree(folder.parent / "model", tmp_path / "model")
    save_plan(plan, tmp_path / "plan.json")
    command = ["build", "--plan", str(tmp_path / "plan.json"), "--model", str(tmp_path / "model"),
               "--output", str(tmp_path / "bundle"), "--threads", "1"]  # fmt: skip
    assert main([*command, "--verify"]) == 0
    assert exports == []
    assert "onnxruntime against PyTorch, float32" in capsys.readouterr().out
    engines = load_bundle(tmp_path / "bundle").engines
    assert [(e.bucket, e.verified) for e in engines] == [(0, True), (1, True), (None, True)]
    assert main([*command, "--dtype", "fp16"]) == 0
    assert main([*command, "--batch", "4", "--no-dense"]) == 0
    assert [(e["dtype"], e["batch"], e["dense"]) for e in exports] == [
        ("float16", 2, True),
        ("float32", 4, False),
    ]
    save_plan(replace(plan, schedule=(0, 1, 0, 1)), tmp_path / "plan.json")
    assert main(command) == 0
    assert len(exports) == 3


def test_verify_reports_quality_and_accuracy(
    onnx_bundle: Bundles,
    prompts_without_encoders: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(onnx_bundle("flux")[0])
    target = tmp_path / "verify.json"
    command = ["verify", folder, "--prompt", "a cat", "--threads", "1", "--json", str(target),
               "--accuracy", "tests.trt_runtime.tiny_bundles:caption_lengths"]  # fmt: skip
    assert main(command) == 0
    report = json.loads(target.read_text())
    assert report["passed"]
    assert report["run"]["max_abs_latent_diff"] <= 1e-3
    assert report["run"]["quality_onnxruntime"]["psnr_db"] > 10
    assert report["run"]["accuracy_dense"] == {"letters": 5.0}
    assert "PSNR dB to dense" in capsys.readouterr().out


def test_verify_names_the_layer_that_departs_first(
    onnx_bundle: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A changed weight in the second block's projection: the first block still agrees."""
    folder, bundle, _ = onnx_bundle("sd3")
    shutil.copytree(folder.parent / "model", tmp_path / "model")
    shutil.copytree(folder, tmp_path / "bundle")
    weight = next(
        w for w in bundle.graphs[0].weights if "transformer_blocks.1.attn.to_v.weight" in w.name
    )
    data = np.memmap(tmp_path / "bundle" / bundle.weights_file, np.float32, mode="r+")
    start = weight.offset // 4
    data[start : start + weight.nbytes // 4] += 1.0
    data.flush()
    target = tmp_path / "verify.json"
    command = ["verify", str(tmp_path / "bundle"), "--graphs-only", "--json", str(target)]
    assert main(command) == 1
    report = json.loads(target.read_text())
    assert report["departs_first"].startswith("transformer_blocks.1.attn,")
    assert "departs first: transformer_blocks.1.attn" in capsys.readouterr().err
    assert not list((tmp_path / "bundle").glob(".exposed*"))


def test_bench_profile_says_where_the_time_goes(
    onnx_bundle: Bundles, prompts_without_encoders: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(onnx_bundle("sd3")[0])
    command = ["bench", "e2e", folder, "--prompt", "a cat", "--repeats", "1", "--threads", "1",
               "--num-warmup-runs", "0", "--profile", "--json"]  # fmt: skip
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["operators"]["dense"]
    assert report["operators"]["plan"]


def test_without_tensorrt_the_embedded_backend_is_built_if_that_is_asked_for(
    onnx_bundle: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = onnx_bundle("flux")
    shutil.copytree(folder, tmp_path / "bundle")
    command = ["build", str(tmp_path / "bundle"), "--backend", "tensorrt", "--threads", "1"]
    assert main(command) == 2
    assert "pip install 'arrowhead[tensorrt]'" in capsys.readouterr().err
    assert main([*command, "--fallback"]) == 0
    said = capsys.readouterr().out
    assert "no TensorRT to build with (" in said and "building for onnxruntime instead" in said
    assert "bucket_1.onnx" in said
    engines = load_bundle(tmp_path / "bundle").engines
    assert {(e.backend, e.verified) for e in engines} == {("onnxruntime", True)}


def test_edited_plan_and_missing_files_are_refused(
    onnx_bundle: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = onnx_bundle("sd3")
    shutil.copytree(folder, tmp_path / "bundle")
    (tmp_path / "bundle" / "bucket_1.onnx").unlink()
    assert main(["build", str(tmp_path / "bundle")]) == 2
    assert "no file bucket_1.onnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["build"], "neither a BUNDLE nor --plan"),
        (["build", "b", "--plan", "p.json"], "both a BUNDLE and --plan"),
        (["build", "--plan", "p.json"], "no --output"),
    ],
)
def test_build_says_what_it_needs(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_another_checkpoint_than_the_plans(
    onnx_bundle: Bundles,
    exports: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A fine-tune is refused unless --model says it is meant; then it warns."""
    from safetensors.torch import load_file, save_file

    folder, _, _ = onnx_bundle("sd3")
    shutil.copytree(folder.parent / "model", tmp_path / "model")
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, weights)
    plan_file = tmp_path / "bundle" / "plan.json"
    shutil.copytree(folder, tmp_path / "bundle")
    command = ["export", "--plan", str(plan_file), "--output", str(tmp_path / "bundle")]
    assert main(command) == 2
    assert "those the plan was measured on" in capsys.readouterr().err
    assert main(["plan", "check", str(plan_file), "--model", str(tmp_path / "model")]) == 2
    assert exports == []
    assert main([*command, "--model", str(tmp_path / "model"), "--no-dense"]) == 0
    assert "measured errors do not hold" in capsys.readouterr().err
    assert len(exports) == 1
