"""Verbs that serve a bundle with Triton: triton, bench serve."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trt_runtime.cli_common import (
    Verbs,
    add_backend,
    add_json,
    add_prompts,
    add_verb,
    bytes_text,
    progress_bar,
    prompts_of,
    show_table,
    write_json,
)


def add_verbs(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "triton",
        triton,
        "write a bundle as a model of a Triton model repository, and say how it is called",
        "  arrowhead triton bundle --output models\n"
        "  arrowhead triton bundle --output models --kind stream --name arrowhead_stream\n"
        "  arrowhead triton new-bundle --output models --version 2 --check \\\n"
        "      --server build/triton-server",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--output", type=Path, required=True, metavar="REPOSITORY")
    parser.add_argument("--name", default="arrowhead", help="of the model (default arrowhead)")
    parser.add_argument(
        "--kind",
        choices=("picture", "stream"),
        default="picture",
        help="answer once (default), or after every step too, over gRPC streams",
    )
    parser.add_argument("--version", type=int, default=1, metavar="N", help="default 1; replaced")
    parser.add_argument("--check", action="store_true", help="load it in a server and draw with it")
    _add_settings(parser)


def add_serve(actions: Verbs) -> None:
    """Add `serve` to the actions of bench."""
    parser = add_verb(
        actions,
        "serve",
        serve,
        "load a bundle served by Triton, and hold it against the runtime in process",
        "  arrowhead bench serve bundle --server build/triton-server\n"
        "  arrowhead bench serve bundle --requests 200 --concurrency 8 --rate 2 --json serve.json",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_prompts(parser)
    parser.add_argument("--requests", type=int, default=20, help="of each part (default 20)")
    parser.add_argument("--concurrency", type=int, default=4, help="clients (default 4)")
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="requests a second of the open loop (default: 70 %% of what the clients reached)",
    )
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    _add_settings(parser)
    add_json(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    add_backend(parser)
    parser.add_argument("--instances", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait (default 64)"
    )
    parser.add_argument(
        "--queue-seconds", type=float, default=120, metavar="S", help="how long (default 120)"
    )
    parser.add_argument(
        "--gather-ms",
        type=float,
        default=0,
        metavar="MS",
        help="wait so long for requests to share a call, if the bundle has room (default 0)",
    )
    parser.add_argument("--no-warmup", action="store_true", help="be ready before a first picture")
    parser.add_argument(
        "--server",
        type=Path,
        metavar="FOLDER",
        help="environment with a tritonserver (python -m trt_runtime.triton.environment FOLDER); "
        "default: $ARROWHEAD_TRITON, then tritonserver on PATH",
    )


def _settings(arguments: argparse.Namespace) -> Any:
    from trt_runtime.triton.repository import Settings

    return Settings(
        instances=arguments.instances,
        backend=arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        weights=arguments.weights,
        queue=arguments.queue,
        queue_seconds=arguments.queue_seconds,
        gather_ms=arguments.gather_ms,
        warmup=not arguments.no_warmup,
    )


def triton(arguments: argparse.Namespace) -> int:
    """Write the model, explain it, and check it if asked to."""
    from trt_runtime.triton.repository import write_model

    folder = write_model(
        arguments.bundle,
        arguments.output,
        name=arguments.name,
        kind=arguments.kind,
        version=arguments.version,
        settings=_settings(arguments),
    )
    _explain(arguments, folder)
    return _check(arguments) if arguments.check else 0


def _explain(arguments: argparse.Namespace, folder: Path) -> None:
    """Print what the model takes and gives, what it weighs, and how it is started and called."""
    from trt_runtime.bundles import open_bundle
    from trt_runtime.live import rows_per_picture
    from trt_runtime.triton.interface import inputs, outputs

    bundle, plan = open_bundle(folder / str(arguments.version) / "bundle")
    pictures = bundle.batch // rows_per_picture(plan)
    for what, fields in (
        ("takes", inputs(bundle, plan, arguments.kind)),
        ("gives", outputs(plan, arguments.kind)),
    ):
        rows = [
            (f.name, "BYTES" if f.datatype == "STRING" else f.datatype, [pictures, *f.dims], f.says)
            for f in fields
        ]
        title = f"{folder} {what}; the first dimension is the pictures, {pictures} at most"
        show_table(title, ("tensor", "type", "shape", "is"), rows)
    files = [path for path in (folder / str(arguments.version)).rglob("*") if path.is_file()]
    print(f"version {arguments.version}: {bytes_text(sum(f.stat().st_size for f in files))}")
    print(
        f"start: tritonserver --model-repository={arguments.output.resolve()} "
        "--disable-auto-complete-config"
    )
    stream = " --stream" if arguments.kind == "stream" else ""
    client = f"python -m trt_runtime.triton.client --model {arguments.name}{stream}"
    print(f'call:  {client} --prompt "a red circle"')


def _check(arguments: argparse.Namespace) -> int:
    """Load the model in a server on the loopback and draw one picture."""
    from trt_runtime.triton.client import Client
    from trt_runtime.triton.server import Server, find_server

    installation = find_server(arguments.server)
    with (
        progress_bar() as progress,
        Server(arguments.output, installation, explicit=True, load=[arguments.name]) as server,
    ):
        progress("drawing a picture", 0, 1)
        with Client(f"127.0.0.1:{server.grpc}", model=arguments.name) as client:
            draw = client.stream if arguments.kind == "stream" else client.draw
            answer = draw(["a red circle above a blue square"], seed=0)
    told = answer.timings[0]
    print(
        f"checked: {arguments.name} loads and drew a picture of {len(answer.pictures[0])} bytes in "
        f"{answer.seconds:.3f} s, {told['pipeline_seconds']:.3f} of them in the pipeline"
    )
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """Load the served bundle and print the table."""
    from trt_runtime.bundles import model_source, open_bundle
    from trt_runtime.triton.load import bench_serve
    from trt_runtime.triton.server import find_server

    bundle, _ = open_bundle(arguments.bundle)
    with progress_bar() as progress:
        report = bench_serve(
            arguments.bundle,
            find_server(arguments.server),
            prompts_of(arguments, model_source(bundle, arguments.bundle)),
            requests=arguments.requests,
            concurrency=arguments.concurrency,
            rate=arguments.rate,
            protocol=arguments.protocol,
            settings=_settings(arguments),
            progress=progress,
        )
    if arguments.json:
        write_json(report, arguments.json)
    if arguments.json != "-":
        _show(report)
    return 1 if any(report[part]["errors"] for part in _PARTS if part in report) else 0


_PARTS = {
    "in_process": "in process",
    "one_client": "one client",
    "closed_loop": "closed loop",
    "open_loop": "open loop",
}
_COLUMNS = ("p50_seconds", "p90_seconds", "p99_seconds", "pipeline_seconds", "pictures_per_second")


def _show(report: dict[str, Any]) -> None:
    rows = []
    for part, label in _PARTS.items():
        found = report[part]
        if part == "closed_loop":
            label += f", {report['concurrency']} clients"
        if part == "open_loop":
            label += f", {report['rate']:.3g} a second"
        numbers = (f"{found[c]:.4g}" if c in found else "" for c in _COLUMNS)
        rows.append((label, found["requests"], found["errors"], *numbers))
    header = ("", "requests", "errors", "p50 s", "p90 s", "p99 s", "pipeline s", "pictures/s")
    show_table(f"{report['protocol']}, {report['device']}", header, rows)
    alone = report["one_client"]
    if "overhead_p50_ms" in alone:
        print(
            "overhead of serving a picture, beyond the pipeline and "
            f"{alone['png_seconds'] * 1e3:.1f} ms of encoding: "
            f"median {alone['overhead_p50_ms']:.1f} ms, "
            f"p99 {alone['overhead_p99_ms']:.1f} ms"
        )
