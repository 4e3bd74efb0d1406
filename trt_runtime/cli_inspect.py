"""Verbs that only look: inspect, doctor."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trt_runtime.cli_common import Verbs, add_json, add_verb, bytes_text, show_table, write_json


def add_verbs(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "inspect",
        inspect,
        "show what a bundle holds and what memory it takes",
        "  arrowhead inspect bundle\n  arrowhead inspect bundle --json",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_json(parser)
    parser = add_verb(
        verbs,
        "doctor",
        doctor,
        "show what this machine can run and what to install for more",
        "  arrowhead doctor\n  arrowhead doctor --json doctor.json",
    )
    add_json(parser)


def inspect(arguments: argparse.Namespace) -> int:
    """Show sizes and modes."""
    from trt_runtime.inspection import inspect_bundle

    report = inspect_bundle(arguments.bundle)
    if arguments.json:
        write_json(report, arguments.json)
    if arguments.json == "-":
        return 0
    rows = []
    for graph in report["graphs"]:
        modes = graph["modes"] or {}
        rows.append(
            (
                graph["file"],
                "" if graph["steps"] is None else graph["steps"],
                *(modes.get(kind, "") for kind in ("full", "arrow", "cached")),
                *(bytes_text(graph[k]) for k in ("weights", "cache_in", "cache_out", "io")),
            )
        )
    batch = report["batch_range"]
    count = f"{report['batch']} rows"
    if batch is not None:
        count = f"{batch['min']} to {count} (tuned for {batch['opt']}, sizes at {batch['max']})"
    title = (
        f"{report['architecture']} {report['picture'][0]} x {report['picture'][1]}, "
        f"{report['dtype']}, {count}, {report['steps']} steps"
    )
    show_table(
        title,
        (
            "graph",
            "steps",
            "full",
            "arrow",
            "cached",
            "weights",
            "caches read",
            "caches written",
            "other I/O",
        ),
        rows,
    )
    print(
        f"weights: {bytes_text(report['weights_shared'])} shared by all buckets, "
        f"{bytes_text(report['weights_embedded'])} with a copy in each; "
        f"file {bytes_text(report['weights_file'])}"
    )
    print(f"caches: {bytes_text(report['cache_bytes'])} in {report['cache_groups']} groups")
    print(f"schedule: {' '.join(map(str, report['schedule']))}")
    for engine in report["engines"]:
        _show_engine(engine)
    return 0


def _show_engine(engine: dict[str, Any]) -> None:
    verified = "run once" if engine["verified"] else "never run"
    name = "dense" if engine["bucket"] is None else f"bucket {engine['bucket']}"
    print(f"engine: {engine['backend']}, {name}, {verified}, {engine['seconds']:.2f} s")
    if engine["bytes"] is None:
        return
    sizes = {"file": "bytes", "weights of its own": "own_weights", "activations": "activations"}
    known = (
        f"{what} {'unknown' if engine[key] is None else bytes_text(engine[key])}"
        for what, key in sizes.items()
    )
    print(f"  {', '.join(known)}; weights {engine['weights']}, {engine['plugins']} plugins")


def doctor(arguments: argparse.Namespace) -> int:
    """Show what was found; never a failure."""
    from trt_runtime.doctor import examine

    findings = examine()
    if arguments.json:
        write_json([asdict(finding) for finding in findings], arguments.json)
    if arguments.json != "-":
        rows = [
            (f.subject, "yes" if f.ok else "no", f.found, f.good_for, f.install) for f in findings
        ]
        show_table("this machine", ("", "there", "found", "good for", "for more, install"), rows)
    return 0
