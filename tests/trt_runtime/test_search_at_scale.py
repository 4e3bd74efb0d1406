"""The search timed at true scale, on a model small enough for a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trt_runtime import search_at_scale


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_every_stage_is_reported(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search_at_scale, "TARGET_STEPS", 8)
    path = tmp_path / "report.json"
    command = [kind, "--small", "--steps", "4", "--prompts", "2", "--json", str(path)]
    assert search_at_scale.main(command) == 0
    report = json.loads(path.read_text())
    assert report["recorded_ratio"] == pytest.approx(report["recorded_ms"] / report["plain_ms"])
    told = report["extrapolated"]
    steps = report["recorded_ms"] + (told["runs"] - 1) * report["planned_ms"]
    assert told["search_seconds"] == pytest.approx(8e-3 * steps + report["choose_seconds"])
    assert 0 < report["choose_saved"] < 1
    assert report["search_basis"] in ("measured", "predicted") and report["search_runs"] >= 2
    assert "memory beside the model" in report["announced"]
    assert capsys.readouterr().out.count("plain_ms") >= 4


def test_as_many_steps_as_aimed_at_are_searched_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_at_scale, "TARGET_STEPS", 4)
    path = tmp_path / "report.json"
    command = ["sd3", "--small", "--steps", "4", "--prompts", "2", "--json", str(path)]
    assert search_at_scale.main(command) == 0
    report = json.loads(path.read_text())
    assert "extrapolated" not in report and "recorded_ms" not in report
    plain = 4 * 2 * report["plain_ms"] / 1e3
    assert report["search_ratio"] == pytest.approx(report["search_seconds"] / plain)
