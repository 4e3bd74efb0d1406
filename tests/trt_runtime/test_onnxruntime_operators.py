"""The operator library in the runtime: whole runs with it, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plans.bundle import TensorSpec
from plans.errors import ArrowheadError
from tests import operator_library
from tests.trt_runtime.conftest import Made
from trt_runtime import bench, doctor, load_pipeline, onnxruntime_operators
from trt_runtime.onnxruntime_operators import VARIABLE, find_operators, operators_for
from trt_runtime.parity import compare_graphs
from trt_runtime.pipeline import generate

Bundles = Callable[[str], Made]
KINDS = ["sd3", "flux"]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Path:
    path = operator_library.built()
    monkeypatch.setenv(VARIABLE, str(path))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_graph_agrees_with_pytorch(kind: str, onnx_bundle: Bundles, library: Path) -> None:
    rows = compare_graphs(onnx_bundle(kind)[0], threads=2)
    assert all(row.passed for row in rows), rows
    assert max(row.max_abs for row in rows) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_agrees_with_pytorch(
    kind: str, onnx_bundle: Bundles, prompts_without_encoders: None, library: Path
) -> None:
    folder, _, _ = onnx_bundle(kind)
    made = {}
    for backend in ("onnxruntime", "torch"):
        pipe = load_pipeline(folder, backend=backend)
        pipe.set_progress_bar_config(disable=True)
        pipe.transformer.state.poison = True
        made[backend] = generate(pipe, ["a cat"], seed=2)[0].latents
    assert (made["onnxruntime"] - made["torch"]).abs().max() <= 1e-3


def test_the_plan_takes_the_kernels_and_dense_stays_stock(
    onnx_bundle: Bundles, prompts_without_encoders: None, library: Path
) -> None:
    folder, _, _ = onnx_bundle("sd3")
    report = bench.end_to_end(folder, ["a cat"], repeats=1, warmup=0, profile=True, threads=1)
    ours = {"ArrowAttention", "CachedHead"}
    assert report["attention"] == "operator library"
    assert ours & set(report["operators"]["plan"])
    assert "Softmax" not in report["operators"]["plan"]
    assert not ours & set(report["operators"]["dense"])


def test_which_sessions_take_it(onnx_bundle: Bundles, library: Path) -> None:
    _, bundle, _ = onnx_bundle("sd3")
    graph, dense = bundle.graphs[0], bundle.dense
    assert dense is not None
    assert operators_for(graph, "cpu") == library
    assert operators_for(dense, "cpu") is None
    assert operators_for(graph, "cuda") is None  # fp32, which the CUDA kernels have not
    half = replace(graph, outputs=(TensorSpec("sample", "float16", (1,)),))
    assert operators_for(half, "cuda:0") == library


def test_where_it_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = (tmp_path / "both.so", tmp_path / "cpu.so")
    monkeypatch.setattr(onnxruntime_operators, "BUILT", built)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert find_operators() is None
    built[1].touch()
    assert find_operators() == built[1]
    built[0].touch()
    assert find_operators() == built[0]
    monkeypatch.setenv(VARIABLE, "")
    assert find_operators() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent.so"))
    with pytest.raises(ArrowheadError, match="operator library .*absent.so, which is no file"):
        find_operators()


def test_another_kind_of_file_is_explained(
    onnx_bundle: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "text.so").write_text("not a library")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "text.so"))
    with pytest.raises(ArrowheadError, match=r"operator library .*text\.so.*make plugins-cpu"):
        compare_graphs(onnx_bundle("sd3")[0], threads=1)


def finding() -> Any:
    return next(f for f in doctor.examine() if f.subject == "ONNX Runtime operators")


def test_doctor_reports_it(library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert finding().ok and finding().found == str(library)
    monkeypatch.setenv(VARIABLE, "")
    assert not finding().ok and "libonnxruntime-dev" in finding().install
    (tmp_path / "text.so").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "text.so"))
    assert not finding().ok and "make plugins-cpu" in finding().install
