"""Verbs that make bundles and engines: export, build."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from plans.bundle import BUNDLE_FILE, Bundle
from plans.errors import ArrowheadError
from plans.plan import Plan, load_plan
from trt_runtime.cli_common import (
    Verbs,
    add_backend,
    add_verb,
    bytes_text,
    dtype_of,
    progress_bar,
    session_of,
    show_table,
)


def add_verbs(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "export",
        export,
        "export a plan's checkpoint: one ONNX graph per bucket, one weights file",
        "  arrowhead export --plan plan.json --output bundle\n"
        "  arrowhead export --plan plan.json --model my-fine-tune --dtype fp16 --batch 4 \\\n"
        "      --output bundle\n"
        "  arrowhead export --plan plan.json --batch-range 2 2 8 --output bundle",
    )
    _add_export(parser, required=True)
    parser = add_verb(
        verbs,
        "build",
        build,
        "make a bundle's engines and run each once; with --plan, export first where needed; "
        "TensorRT engines that are there and fit are kept",
        "  arrowhead build bundle\n"
        "  arrowhead build --plan plan.json --output bundle --dtype fp32 --verify\n"
        "  arrowhead build bundle --backend tensorrt --weights shared",
    )
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    _add_export(parser, required=False)
    parser.add_argument("--verify", action="store_true", help="compare each graph with PyTorch too")
    add_backend(parser)
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="where TensorRT cannot build, say so and build for onnxruntime instead",
    )
    parser.add_argument(
        "--strip-weights",
        action="store_true",
        help="TensorRT: leave embedded weights out of the files and put them back at load",
    )
    parser.add_argument(
        "--no-plugins",
        action="store_true",
        help="TensorRT: inline the operators' function bodies, right but slow",
    )
    parser.add_argument(
        "--optimization-level",
        type=int,
        metavar="0-5",
        help="TensorRT: how long the builder looks for fast kernels (default: its own)",
    )


def _add_export(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--plan", type=Path, required=required, metavar="PLAN")
    parser.add_argument(
        "-m",
        "--model",
        help="folder in diffusers' format, or hub id, in place of the one the plan names",
    )
    parser.add_argument("--revision", metavar="NAME", help="of the hub id")
    parser.add_argument("--output", type=Path, required=required, metavar="BUNDLE")
    parser.add_argument("--dtype", default="fp32", help="fp32 (default), fp16 or bf16")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument(
        "--batch",
        type=int,
        metavar="ROWS",
        help="rows of a transformer call: two a picture under classifier-free guidance, else "
        "one (default: one picture)",
    )
    rows.add_argument(
        "--batch-range",
        type=int,
        nargs=3,
        metavar=("MIN", "OPT", "MAX"),
        help="graphs that take from MIN to MAX rows; TensorRT tunes its engines for OPT",
    )
    parser.add_argument(
        "--no-dense", action="store_true", help="leave out the stock graph that bench compares with"
    )


def export(arguments: argparse.Namespace) -> int:
    """Export and list the graphs."""
    bundle = _export(arguments, load_plan(arguments.plan))
    rows = [
        (graph.file, len(graph.inputs), len(graph.outputs), len(graph.weights))
        for graph in bundle.all_graphs
    ]
    show_table(f"{arguments.output}", ("graph", "inputs", "outputs", "weights"), rows)
    size = (arguments.output / bundle.weights_file).stat().st_size
    print(f"{bundle.weights_file}: {bytes_text(size)}, shared by all graphs")
    return 0


def _export(arguments: argparse.Namespace, plan: Plan) -> Bundle:
    try:
        from exporter import export_bundle
    except ImportError as error:
        raise ArrowheadError(
            "export",
            got=f"no module {error.name}",
            expected="onnx and onnxscript",
            fix="pip install 'arrowhead[export]'",
        ) from error
    from trt_runtime.cli_models import load_plan_transformer, plan_source

    dtype = dtype_of(arguments.dtype)
    source = plan_source(plan, arguments.plan, arguments.model)
    revision = arguments.revision or plan.model.revision
    transformer = load_plan_transformer(plan, source, dtype, revision)
    with progress_bar() as progress:
        return export_bundle(
            transformer,
            plan,
            arguments.output,
            dtype=dtype,
            batch=_batch(arguments, plan),
            source=source,
            dense=not arguments.no_dense,
            progress=progress,
        )


def _batch(arguments: argparse.Namespace, plan: Plan) -> int | tuple[int, int, int]:
    """Rows of a call, or min, opt and max of them."""
    if arguments.batch_range:
        rows = tuple(arguments.batch_range)
        return rows if len(set(rows)) > 1 else rows[0]
    return arguments.batch or (2 if plan.sampler.cfg else 1)


def build(arguments: argparse.Namespace) -> int:
    """Build engines; 1 if --verify finds that they disagree with PyTorch."""
    from trt_runtime import build as builder
    from trt_runtime.engine_report import HEADER, engine_rows
    from trt_runtime.tensorrt_library import find_plugin_library

    options = _build_options(arguments)
    folder = _bundle_folder(arguments)
    if arguments.backend == "tensorrt":
        _show_estimate(folder, options["weights"])
        if options["plugins"] and find_plugin_library() is None:
            print(
                "warning: no plugin library (make plugins): engines get the operators' function "
                "bodies, which are right, slow, and too large for 2K pictures",
                file=sys.stderr,
            )
    with progress_bar() as progress:
        builder.build(
            folder,
            backend=arguments.backend,
            device=arguments.device,
            **options,
            progress=progress,
        )
    rows = engine_rows(folder, arguments.backend)
    cells = [tuple(_cell(name, row[name]) for name in HEADER) for row in rows]
    title = f"engines of {folder}, {arguments.backend}, weights {options['weights']}"
    show_table(title, HEADER, cells)
    if arguments.backend == "tensorrt" and not all(row["ran"] for row in rows):
        print("not run, and not compared with PyTorch: this machine cannot run these engines")
        return 0
    return _verify_graphs(arguments, folder) if arguments.verify else 0


def _build_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give what the backend's builder takes, after a look at whether the backend is there."""
    if arguments.backend == "tensorrt":
        from trt_runtime.tensorrt_build import usable_tensorrt

        try:
            usable_tensorrt()
        except ArrowheadError as error:
            if not arguments.fallback:
                raise
            print(f"no TensorRT to build with ({error.got}): building for onnxruntime instead")
            print(f"for TensorRT: {error.fix}")
            arguments.backend, arguments.device = "onnxruntime", "cpu"
    if arguments.backend != "tensorrt":
        return session_of(arguments)
    weights = "stripped" if arguments.strip_weights else arguments.weights
    return {
        "weights": weights,
        "optimization_level": arguments.optimization_level,
        "plugins": not arguments.no_plugins,
    }


def _show_estimate(folder: Path, weights: str) -> None:
    from trt_runtime.engine_report import builder_memory, estimate

    needed = estimate(folder, weights)
    parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in needed.items())
    print(f"device memory for a run: {parts}")
    print(f"host memory to build: about {bytes_text(builder_memory(folder, weights))}")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "ran":
        return "yes" if value else "no"
    if name in ("engine", "weights", "activations", "caches"):
        return bytes_text(value)
    return f"{value:.2f}" if name == "seconds" else str(value)


def _bundle_folder(arguments: argparse.Namespace) -> Path:
    """Give the bundle to build; with --plan, export it unless it is there and up to date."""
    if (arguments.plan is None) == (arguments.bundle is None):
        raise ArrowheadError(
            "arrowhead build",
            got="both a BUNDLE and --plan" if arguments.plan else "neither a BUNDLE nor --plan",
            expected="one of them",
            fix="arrowhead build BUNDLE, or arrowhead build --plan PLAN --output BUNDLE",
        )
    if arguments.plan is None:
        return arguments.bundle
    if arguments.output is None:
        raise ArrowheadError(
            "arrowhead build --plan",
            got="no --output",
            expected="the folder to export to",
            fix="add --output BUNDLE",
        )
    plan = load_plan(arguments.plan)
    if not _up_to_date(arguments, plan):
        _export(arguments, plan)
    return arguments.output


def _up_to_date(arguments: argparse.Namespace, plan: Plan) -> bool:
    """Whether the folder holds this export already, whole."""
    from trt_runtime.bundles import model_source, open_bundle
    from trt_runtime.cli_models import local_fingerprint, plan_source

    if not (arguments.output / BUNDLE_FILE).is_file():
        return False
    try:
        bundle, exported = open_bundle(arguments.output)
        source = plan_source(plan, arguments.plan, arguments.model)
        same_place = model_source(bundle, arguments.output) == source
    except ArrowheadError:
        return False  # the export says what is wrong, if it still is
    # An export for another checkpoint than the plan's names that one's weights.
    same_plan = replace(plan, model=exported.model).sha256 == exported.sha256
    weights = local_fingerprint(source) or exported.model.weights_sha256
    return (
        same_place
        and same_plan
        and weights == exported.model.weights_sha256
        and bundle.dtype == dtype_of(arguments.dtype)
        and (bundle.batch_range or bundle.batch) == _batch(arguments, plan)
        and (bundle.dense is None) == arguments.no_dense
    )


def _verify_graphs(arguments: argparse.Namespace, folder: Path) -> int:
    from trt_runtime.cli_run import report_parity
    from trt_runtime.verify import verify

    with progress_bar() as progress:
        report = verify(
            folder,
            backend=arguments.backend,
            device=arguments.device,
            **session_of(arguments),
            progress=progress,
        )
    return report_parity(folder, report)
