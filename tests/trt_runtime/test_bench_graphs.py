"""Rows of ONNX Runtime in bench e2e: exported from the bench's weights, held against PyTorch."""

from __future__ import annotations

import json
import weakref
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plans import architectures
from plans.architectures import Architecture
from plans.bundle import Bundle
from plans.errors import ArrowheadError
from plans.plan import Plan
from plans.synthetic import Mix
from tests.trt_runtime.test_bench_steps import FLUX, SD3, settings, tiny
from trt_runtime import bench_steps, step_onnxruntime
from trt_runtime.bench_steps import measure_steps
from trt_runtime.cli import main
from trt_runtime.onnxruntime_engine import runtime
from trt_runtime.step_onnxruntime import GraphSettings, check_sessions

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from exporter import export_bundle  # noqa: E402

MIX = (Mix(1, 2, 1, 1),)


class Exports:
    """Exports as the command does, and notes which buckets."""

    def __init__(self, architecture: Architecture, scale: float = 1.0, dtype: str = "fp32") -> None:
        self.rows, self.scale, self.dtype = architecture.rows, scale, dtype
        self.buckets: list[list[int]] = []

    def __call__(
        self, model: nn.Module, plan: Plan, folder: Path, buckets: Sequence[int]
    ) -> Bundle:
        self.buckets.append(list(buckets))
        last = model.get_parameter("proj_out.weight")
        with torch.no_grad():
            last *= self.scale
            bundle = export_bundle(
                model, plan, folder, dtype=self.dtype, batch=self.rows, dense=False, buckets=buckets
            )
            last /= self.scale
        return bundle


@pytest.mark.parametrize("name", [SD3, FLUX])
def test_rows_of_onnxruntime_are_beside_the_others(name: str, tmp_path: Path) -> None:
    architecture = tiny(name)
    exports = Exports(architecture)
    rows = [("onnxruntime", MIX), ("torch", MIX), ("onnxruntime", ())]
    report = measure_steps(
        architecture, rows, settings(loop=True, profile=True),
        graphs=GraphSettings(exports, tmp_path),
    )  # fmt: skip
    assert not report["failures"]
    assert exports.buckets == [[0, 1], [0]]
    assert list(tmp_path.iterdir()) == []
    plan, torch_row, dense = report["rows"]
    for row in (plan, dense):
        assert row["backend"] == "onnxruntime" and row["attention"] == "function bodies"
        assert row["finite"] and row["ms"] > 0 and row["host_ms"] > 0
        assert row["baselines_ms"].keys() == {"eager"}
        assert all(error < 1e-5 for error in row["torch_error"])
        assert 0 < row["weights_file_bytes"] == row["weight_bytes"]
        assert row["weights_ratio"] == 1 and row["copied_weight_bytes"] == 0
    assert len(plan["torch_error"]) == 2 and plan["full_step_ms"] > 0 and plan["loop_seconds"] > 0
    # One head of four is cached; PyTorch's rows merge the others into the same buffers.
    assert 4 * plan["cache_bytes"] == torch_row["cache_bytes"] > 0 == dense["cache_bytes"]


def test_without_a_full_step_one_bucket_is_exported(tmp_path: Path) -> None:
    architecture = tiny(SD3)
    exports = Exports(architecture)
    mixes = (Mix(1, 1, 1, 2), *MIX)
    report = measure_steps(
        architecture, [("onnxruntime", MIX), ("onnxruntime", mixes)],
        settings(full_step=False, baselines=()), graphs=GraphSettings(exports, tmp_path),
    )  # fmt: skip
    assert not report["failures"] and exports.buckets == [[1], [1, 2]]
    assert [len(row["buckets_ms"]) for row in report["rows"]] == [1, 2]


def test_a_row_leaves_no_weights_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = tiny(SD3)
    opened: list[weakref.ref[Any]] = []

    def open_weights(*arguments: Any) -> Any:
        weights = own(*arguments)
        opened.append(weakref.ref(weights))
        return weights

    own = step_onnxruntime.open_weights
    monkeypatch.setattr(step_onnxruntime, "open_weights", open_weights)
    bench = bench_steps.Workbench(
        architecture, settings(baselines=()), print,
        GraphSettings(Exports(architecture), tmp_path),
    )  # fmt: skip
    assert bench.row("onnxruntime", ())["finite"]
    assert [reference() for reference in opened] == [None]


def test_another_sample_than_torchs_is_a_failure(tmp_path: Path) -> None:
    architecture = tiny(FLUX)
    report = measure_steps(
        architecture, [("onnxruntime", MIX)], settings(full_step=False),
        graphs=GraphSettings(Exports(architecture, scale=2.0), tmp_path),
    )  # fmt: skip
    (failure,) = report["failures"]
    assert failure["row"] == "onnxruntime, 1/2x1/1: its sample"
    assert "beside backend torch" in failure["error"]
    assert report["rows"][0]["torch_error"] == [pytest.approx(1.0, rel=0.1)]  # but for the bias


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_rows_on_a_gpu_count_their_memory(tmp_path: Path) -> None:
    if step_onnxruntime.cuda.PROVIDER not in runtime().get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu")
    architecture = architectures.ARCHITECTURES["sd3-medium"].of_depth(4)
    mix = (Mix(7, 8, 1, 9),)
    report = measure_steps(
        architecture, [("onnxruntime", mix), ("torch", mix), ("onnxruntime", ())],
        settings(height=512, width=512, block=128, device="cuda", dtype=torch.bfloat16),
        graphs=GraphSettings(Exports(architecture, dtype="bf16"), tmp_path),
    )  # fmt: skip
    assert not report["failures"] and list(tmp_path.iterdir()) == []
    for row in (report["rows"][0], report["rows"][2]):
        assert 0.8 < row["measured_weights_ratio"] < 1.2
        weights = row["weight_bytes"]
        assert weights + row["cache_bytes"] < row["peak_bytes"] < weights + 4 * 2**30
        assert 0 < row["host_ms"]


def command(*more: str) -> list[str]:
    return ["bench", "e2e", "--architecture", SD3, "--height", "256", "--width", "256",
            "--block", "16", "--no-full-step", "--baseline", "eager", "--repeats", "1",
            "--steps-per-round", "1", "--mix", "1/2x1/1:onnxruntime", "1/2x1/1:torch",
            "dense:onnxruntime", *more]  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the command takes the GPU where there is one, and tiny heads fit no kernel")
    monkeypatch.setitem(architectures.ARCHITECTURES, SD3, tiny(SD3))


@pytest.mark.usefixtures("small")
def test_the_command_exports_times_and_deletes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = tmp_path / "graphs", tmp_path / "steps.json"
    assert main(command("--folder", str(folder), "--json", str(report))) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [row["backend"] for row in rows] == ["onnxruntime", "torch", "onnxruntime"]
    assert folder.is_dir() and list(folder.iterdir()) == []
    shown = capsys.readouterr()
    assert "onnxruntime" in shown.out and "GB of disk" in shown.err


@pytest.mark.usefixtures("small")
def test_what_cannot_run_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr(bench_steps, "random_transformer", no_model)
    assert main(command("--dtype", "bf16")) == 2
    assert "multiplies no bf16" in capsys.readouterr().err
    monkeypatch.setattr(runtime(), "get_available_providers", lambda: ["Other"])
    assert main(command()) == 2
    assert "CPUExecutionProvider" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_told_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(step_onnxruntime.shutil, "disk_usage", lambda _: usage(2**40, 2**40, 0))
    assert main(command()) == 2
    shown = capsys.readouterr().err
    assert "0.0 GB free" in shown and "ready after" not in shown


def test_on_cuda_the_operator_library_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime(), "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(step_onnxruntime.cuda, "check_cuda", lambda _: torch.device("cuda:1"))
    monkeypatch.setattr(step_onnxruntime, "find_operators", lambda: None)
    loaded: list[int] = []
    monkeypatch.setattr(
        step_onnxruntime.cuda, "share_device_arena", lambda _, index: loaded.append(index)
    )
    monkeypatch.setenv("ARROWHEAD_ORT_LIBRARY", "")  # asks for the function bodies
    check_sessions("cuda", torch.bfloat16)
    monkeypatch.delenv("ARROWHEAD_ORT_LIBRARY")
    check_sessions("cuda", torch.float32)
    assert loaded == [1, 1]
    with pytest.raises(ArrowheadError, match="no operator library"):
        check_sessions("cuda", torch.bfloat16)
