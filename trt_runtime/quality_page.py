"""The page of `bench quality`: one HTML file with plots, verdicts and the table.

python -m trt_runtime.quality_page FOLDER draws page and curves of a run anew, wherever it was made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError, atomic_write
from trt_runtime.quality_curves import AXES, MARKS, verdict
from trt_runtime.quality_plots import CURVES, FOOTNOTE, draw_curves, plots
from trt_runtime.quality_report import HEADER, RESULTS, SPREAD, read_report, spread, table
from trt_runtime.quality_settings import VARIANTS

PAGE = "quality.html"
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262b; max-width: 1280px; margin: 2em auto;
  padding: 0 1em; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #e6e6e6; }
td:first-child, th:first-child, table.text td { text-align: left; }
.no { color: #b23a48; } p.note { color: #70767d; font-size: 13px; }
"""
_NOTES = (
    "Accuracy is the share of the facts a caption states that hold in its picture. Its interval is "
    "a bootstrap over captions, each with all its facts and seeds, of the paired change.",
    "Attention FLOPs count query/key pairs, text included; FLOPs of the transformer count a block "
    "that a step cache leaves out by its share of blocks.",
    "Time is that of the transformer's calls in PyTorch at the batch of this run, the median over "
    "calls: plans run on the attention named below, not on an engine.",
    FOOTNOTE,
)


def write_all(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write the curves and the page beside the results; give all three files."""
    draw_curves(report, folder / CURVES)
    write_page(report, folder / PAGE)
    return [folder / name for name in (RESULTS, PAGE, CURVES)]


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write the page; it needs no other file."""
    settings = report["settings"]
    name = Path(str(settings["model"])).name
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>Quality of {escape(name)}</title><style>{_CSS}</style></head><body>",
        f"<h1>Quality against saving: {escape(name)}</h1>",
        f"<p>{escape(_summary(report))}</p>",
        *(f"<p class='note'>{escape(note)}</p>" for note in _NOTES),
        *(f"<h2>{escape(heading)}</h2>{picture}" for heading, picture in plots(report)),
        *_verdicts(report),
        *_spread(report),
        "<h2>Rows</h2>", _table(HEADER, table(report)),
        "<h2>What was run</h2>", _table(("row", "how"), list(_how(report)), "text"),
        "<h2>Settings</h2>", _table(("setting", "value"), list(_settings(report)), "text"),
        "</body></html>\n",
    ]  # fmt: skip
    atomic_write(path, "\n".join(parts))


def _summary(report: dict[str, Any]) -> str:
    s = report["settings"]
    return (
        f"{s['captions']} captions, {s['seeds']} seeds each, {s['height']} x {s['width']} pixels, "
        f"{s['num_inference_steps']} steps, {s['device']}, {s['dtype']}, attention of plans: "
        f"{report['attention']}."
    )


def _verdicts(report: dict[str, Any]) -> Iterator[str]:
    pairs = verdict(report.get("comparisons", []))
    if not pairs:
        return
    yield "<h2>Against the others at equal cost</h2>"
    yield (
        "<p class='note'>The best of our plan, `both`, `priced` or `stacked`, less the other, and "
        "each other curve of ours by itself, "
        "interpolated between rows over the range that both cover; `stacked` and `fewer`, which "
        "turn two knobs, between those of their rows that none of them beats. "
        "Never below: at no cost is the paired 95 % interval wholly under zero. "
        "Above: over the middle half of the range.</p>"
    )
    header = (
        "other", "ours", "mark", "equal", "range", "difference, least to most", "never below",
        "above",
    )  # fmt: skip
    rows = [
        (
            VARIANTS[pair["rival"]].label,
            pair["ours"],
            MARKS[pair["mark"]],
            AXES[pair["axis"]],
            *_outcome(pair),
        )
        for pair in pairs
    ]
    yield _table(header, rows)


def _spread(report: dict[str, Any]) -> Iterator[str]:
    if rows := spread(report):
        yield "<h2>Plans of the same bound</h2>"
        yield "<p class='note'>Each searched with other noise on the same prompts.</p>"
        yield _table(SPREAD, rows)


def _outcome(pair: dict[str, Any]) -> tuple[str, str, str, str]:
    if not pair["saved"]:
        return "none", "no cost that both have", "", ""
    return (
        f"{100 * pair['saved'][0]:.0f} to {100 * pair['saved'][-1]:.0f} %",
        f"{min(pair['difference']):+.2f} to {max(pair['difference']):+.2f}",
        _yes(pair["never_below"]),
        _yes(pair["above_in_the_middle"]),
    )


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _how(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in report["variants"]:
        yield name, report["skipped"].get(name, VARIANTS[name].how)


def _settings(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for source in (
        report["settings"],
        {k: report[k] for k in ("batch", "attention", "git_commit")},
    ):
        yield from ((key, str(value)) for key, value in source.items())
    yield from ((f"version of {k}", str(v)) for k, v in report["versions"].items())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    def cell(text: str) -> str:
        mark = " class='no'" if text == "no" else ""
        return f"<td{mark}>{escape(text)}</td>"

    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "\n".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f"<table class='{kind}'><tr>{head}</tr>\n{body}</table>"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what is in a folder."""
    parser = argparse.ArgumentParser(description="Draw page and curves of bench quality anew.")
    parser.add_argument("folder", type=Path, help="what was --output")
    folder = parser.parse_args(arguments).folder
    try:
        print(*write_all(read_report(folder / RESULTS), folder), sep=", ")
    except ArrowheadError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
