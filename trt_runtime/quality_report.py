"""The report of `bench quality`: its file, its table and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError, atomic_write
from trt_runtime.quality_settings import DELTA, VARIANTS

FORMAT = "arrowhead.quality/1"
RESULTS, CAPTIONS = "results.json", "captions.json"

Row = dict[str, Any]


def open_report(folder: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Start a report, or take up the one in `folder`; raise ArrowheadError where they differ."""
    path = folder / RESULTS
    empty = {"format": FORMAT, "settings": settings, "rows": []}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return empty
    if not resume:
        raise ArrowheadError(
            f"output {path}",
            got="results that are already there",
            expected="a new folder",
            fix="pass --resume to add the missing rows, or name another --output",
        )
    found = read_report(path)
    differ = sorted(
        key
        for key in {*found["settings"], *settings}
        if found["settings"].get(key) != settings.get(key)
    )
    if differ:
        raise ArrowheadError(
            f"settings of {path}",
            got={key: settings.get(key) for key in differ},
            expected={key: found["settings"].get(key) for key in differ},
            fix="resume with the settings of the run, or name another --output",
        )
    return found


def read_report(path: Path) -> dict[str, Any]:
    """Read results.json; raise ArrowheadError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ArrowheadError(
            f"results {path}",
            got="no such file, or one of another kind",
            expected=f"JSON of format {FORMAT}",
            fix="name another --output",
        )
    return found


def save_report(report: dict[str, Any], folder: Path) -> None:
    """Write results.json, whole or not at all."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(folder / RESULTS, text + "\n")


def load_captions(folder: Path) -> dict[str, Any]:
    """Read the marks per caption of the rows that are there."""
    return json.loads((folder / CAPTIONS).read_text(encoding="utf-8"))


def save_captions(by_caption: dict[str, Any], folder: Path) -> None:
    """Write the marks per caption, a row a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(marks)}" for name, marks in by_caption.items()]
    atomic_write(folder / CAPTIONS, "{\n" + ",\n".join(lines) + "\n}\n")


HEADER = (
    "row", "graphs", "attention saved", "FLOPs saved", "ms a picture", "accuracy",
    "change [95 %], points", "PSNR dB", "SSIM", "latent error", "search s",
)  # fmt: skip


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Give the cells of every row, the uncompressed pictures first."""
    first = report["uncompressed"]
    rows: list[tuple[str, ...]] = [
        ("uncompressed", "", "0.0 %", "0.0 %", f"{first['transformer_ms_per_picture']:.3f}",
         _share(first.get("accuracy")), *("",) * 5)
    ]  # fmt: skip
    for row in sorted(report["rows"], key=_order):
        change = ""
        if "interval_points" in row:
            low, high = row["interval_points"]
            change = f"{row['difference_points']:+.1f} [{low:+.1f}, {high:+.1f}]"
        rows.append(
            (
                row["name"],
                str(row.get("buckets", "")),
                _share(row["attention_flops_saved"]),
                _share(row["transformer_flops_saved"]),
                f"{row['transformer_ms_per_picture']:.3f}",
                _share(row.get("accuracy")),
                change,
                f"{row['psnr_db']:.2f}",
                f"{row['ssim']:.4f}",
                f"{row['latent_relative_error']:.3f}",
                f"{row['search_seconds']:.1f}" if row.get("search_seconds") is not None else "",
            )
        )
    return rows


SPREAD = (
    "plans", "searches", "attention saved", "least", "most", "change, points", "worst", "best",
)  # fmt: skip


def spread(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Give what several searches with the same bound found: means, and how far they lie apart."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(report["rows"], key=_order):
        if row["variant"] in VARIANTS and VARIANTS[row["variant"]].knob == DELTA:
            groups.setdefault(f"{row['variant']}, delta {row['delta']:g}", []).append(row)
    rows = []
    for name, found in groups.items():
        if len(found) > 1:
            saved = [100 * row["attention_flops_saved"] for row in found]
            change = [row["difference_points"] for row in found if "difference_points" in row]
            rows.append(
                (name, str(len(found)), *_spread(saved, "{:.1f} %"), *_spread(change, "{:+.1f}"))
            )
    return rows


def _spread(values: list[float], form: str) -> tuple[str, ...]:
    if not values:
        return ("",) * 3
    return tuple(map(form.format, (sum(values) / len(values), min(values), max(values))))


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _order(row: Row) -> tuple[int, float, int]:
    knob = row["threshold"] if row["threshold"] is not None else row["delta"]
    place = -row["steps"] if knob is None else knob
    return list(VARIANTS).index(row["variant"]), place, row.get("search", 0)
