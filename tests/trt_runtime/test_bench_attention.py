"""The benchmark of attention alone, as far as a machine without a GPU can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plans.errors import ArrowheadError
from plugins.torch import library
from trt_runtime import bench_attention
from trt_runtime.attention_cases import CASES, DENSE, Mix
from trt_runtime.bench_attention import measure_attention, table
from trt_runtime.cli import main


def row(mix: str, implementation: str, share: float, ms: float) -> dict[str, Any]:
    return {"case": "flux-2k", "mix": mix, "implementation": implementation,
            "share_kept": share, "ms": ms, "tflops_effective": 600.0}  # fmt: skip


ROWS = [
    row(DENSE, "arrowhead", 1.0, 4.0),
    row(DENSE, "sdpa-cudnn", 1.0, 6.0),
    row("all hw4", "arrowhead", 0.125, 1.0),
    row("all cached", "memcpy", 0.0, 0.1),
]


@pytest.mark.parametrize("name", CASES)
def test_mixes_are_of_all_heads_and_shares_fall(name: str) -> None:
    case = CASES[name]
    mixes = case.mixes()
    assert all(len(mix.modes()) == case.heads for mix in mixes)
    assert len({mix.name for mix in mixes}) == len(mixes)
    pure = [case.share_kept(mix) for mix in mixes if mix not in case.searched]
    assert pure[0] == 1 and pure[-1] == 0
    assert pure == sorted(pure, reverse=True)


def test_names_of_mixes() -> None:
    assert Mix(24, 0, 0, 0).name == DENSE
    assert Mix(6, 12, 4, 6).name == "6 full + 12 hw4 + 6 cached"


def test_table_compares_with_dense_cudnn_and_with_itself() -> None:
    cells = table(ROWS)
    assert cells[0][-2:] == ("1.50", "1.00")
    assert cells[2][-2:] == ("6.00", "0.50")
    assert cells[3][-2:] == ("60.00", "-")


def test_without_a_gpu_or_the_library_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "attention"]) == 2
    assert "got no GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(library.VARIABLE, "absent.so")
    library.load_library.cache_clear()
    with pytest.raises(ArrowheadError, match="no file at absent.so.*make plugins"):
        measure_attention(["flux-2k"], ["arrowhead"], launches=10, rounds=1)


def test_finished_cases_outlive_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def bench_case(name: str, *_: Any) -> list[dict[str, Any]]:
        if name == "sd3-2k":
            raise RuntimeError("out of memory")
        return ROWS

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_attention, "load_library", lambda: None)
    monkeypatch.setattr(bench_attention, "device_name", lambda _: "a card")
    monkeypatch.setattr(bench_attention, "bench_case", bench_case)
    target = tmp_path / "attention.json"
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["bench", "attention", "--case", "flux-2k", "sd3-2k", "--json", str(target)])
    assert json.loads(target.read_text())["rows"] == ROWS


def test_the_report_says_where_it_ran(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_attention, "load_library", lambda: None)
    monkeypatch.setattr(bench_attention, "device_name", lambda _: "a card")
    monkeypatch.setattr(bench_attention, "bench_case", lambda *_: ROWS)
    target, plot = tmp_path / "new" / "attention.json", tmp_path / "plots" / "roofline.png"
    assert main(["bench", "attention", "--case", "flux-2k", "--json", str(target),
                 "--plot", str(plot)]) == 0  # fmt: skip
    report = json.loads(target.read_text())
    assert report["rows"] == ROWS
    assert report["device"] == "a card"
    assert report["versions"]["torch"] and "git_commit" in report
    assert plot.stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "a card, bfloat16: medians of 5 rounds of 200 launches" in printed
    assert "all hw4" in printed
