"""The demo's page: one self-contained HTML file, pictures and all."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #66727f; --line: #e2e6ea; --good: #18794e; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #f6f7f8; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 34px; margin: 0 0 4px; } h2 { font-size: 24px; margin: 0 0 2px; }
.lead, .note { color: var(--soft); margin: 0 0 20px; } .note { font-size: 14px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 14px; padding: 28px;
  margin: 28px 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px;
  margin: 18px 0 26px; }
.facts div { border-left: 3px solid #2f6fb2; padding-left: 12px; }
.facts b { display: block; font-size: 25px; line-height: 1.2; } .facts span { color: var(--soft);
  font-size: 13.5px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(225px, 1fr)); gap: 20px; }
figure { margin: 0; } figcaption { font-size: 13px; color: var(--soft); margin-top: 6px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.pair img { width: 100%; border-radius: 6px; display: block; }
.pair small { color: var(--soft); text-align: center; font-size: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; margin-top: 22px; }
td, th { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; }
td:first-child, th:first-child { text-align: left; } th { font-weight: 600; }
img.plan { width: 100%; max-width: 820px; display: block; margin: 26px auto 0; }
"""


def _image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _facts(row: Mapping[str, Any]) -> str:
    facts = (
        (f"{100 * row['attention_flops_saved']:.0f} %", "of attention work saved"),
        (f"{row['seconds_dense'] / row['seconds']:.2f} x", "faster per picture, this machine"),
        (f"{100 * row['caption_accuracy']:.1f} %", "of stated facts right with the plan"),
        (f"{100 * row['caption_accuracy_dense']:.1f} %", "right without it"),
        (f"{row['psnr_db']:.1f} dB", f"PSNR to the dense picture; SSIM {row['ssim']:.3f}"),
        (f"{row['max_abs_latent_diff']:.0e}", "largest latent difference to PyTorch"),
    )
    return "".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in facts)


def _pair(folder: Path, i: int, caption: str) -> str:
    sides = "".join(
        f'<div><img src="{_image(folder / f"{name}-{i}.png")}" alt=""><small>{label}</small></div>'
        for name, label in (("dense", "dense"), ("plan", "with the plan"))
    )
    said = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure><div class="pair">{sides}</div>{said}</figure>'


def _times(row: Mapping[str, Any]) -> str:
    stages = "".join(
        f"<tr><td>{escape(stage)}</td><td>{seconds:.1f}</td></tr>"
        for stage, seconds in row["stage_seconds"].items()
    )
    return (
        "<table><tr><th>stage</th><th>seconds</th></tr>"
        f"{stages}<tr><td>one picture, dense graph</td><td>{row['seconds_dense']:.2f}</td></tr>"
        f"<tr><td>one picture, with the plan</td><td>{row['seconds']:.2f}</td></tr></table>"
    )


def _section(row: Mapping[str, Any], folder: Path) -> str:
    pairs = "".join(_pair(folder, i, caption) for i, caption in enumerate(row["captions"]))
    about = (
        f"{row['steps']} steps in {row['buckets']} bucket graphs, bound {row['delta']} on the "
        f"error of each step and layer; plan found in {row['search_seconds']:.0f} s."
    )
    return (
        f"<section><h2>{row['pipeline']}</h2><p class=lead>{about}</p>"
        f'<div class="facts">{_facts(row)}</div><div class="pairs">{pairs}</div>'
        f'<img class="plan" src="{_image(folder / "plan.png")}" alt="the plan">'
        f"{_times(row)}</section>"
    )


def page(report: Mapping[str, Any], folder: Path) -> str:
    """Lay out report.json and the pictures beside it as one HTML file."""
    sections = "".join(_section(row, folder / row["pipeline"]) for row in report["pipelines"])
    made = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Arrowhead demo</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><main>'
        "<h1>Arrowhead</h1><p class=lead>A trained text-to-image MMDiT in, a searched plan, ONNX "
        "bucket graphs, cached steps, pictures out. Every number on this page is from this run on "
        f"{escape(str(report['device']))}; both sides ran in turns on ONNX Runtime's CPU provider."
        f"</p>{sections}<p class=note>{escape(made)}; commit {escape(str(report['git_commit']))}; "
        f"{report['seconds']:.0f} s in all.</p></main></html>\n"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Summarise the run for the terminal."""
    columns = ("pipeline", "attention saved", "s dense", "s plan", "facts dense", "facts plan")
    out = Table(title="with the plan against the dense graph, same machine, same run")
    for column in (*columns, "PSNR dB", "latent diff"):
        out.add_column(column, justify="left" if column == "pipeline" else "right")
    for row in rows:
        out.add_row(
            row["pipeline"],
            f"{100 * row['attention_flops_saved']:.1f} %",
            f"{row['seconds_dense']:.2f}",
            f"{row['seconds']:.2f}",
            f"{100 * row['caption_accuracy_dense']:.1f} %",
            f"{100 * row['caption_accuracy']:.1f} %",
            f"{row['psnr_db']:.1f}",
            f"{row['max_abs_latent_diff']:.1e}",
        )
    return out
