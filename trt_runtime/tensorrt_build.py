"""One bucket graph to one TensorRT engine file, with its metadata beside it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from plans.bundle import BatchRange, Bundle, GraphSpec, file_sha256
from plans.errors import ArrowheadError, atomic_write
from plans.plan import Plan
from trt_runtime.doctor import versions
from trt_runtime.engine import CACHE_IN, CACHE_OUT, shape_of
from trt_runtime.inspection import tensor_bytes
from trt_runtime.tensorrt_library import (
    TENSORRT_RTX,
    PluginLibrary,
    TensorRT,
    last_error,
    load_plugins,
    tensorrt,
)
from trt_runtime.tensorrt_metadata import (
    EngineMetadata,
    check_bytes,
    engine_path,
    load_metadata,
    metadata_path,
    rows_of,
    save_metadata,
    step_ranges,
    tensor_entry,
)
from trt_runtime.tensorrt_network import check_io, operators_found, parse_graph, share_weights
from trt_runtime.tensorrt_progress import Phases, interrupt_noted, progress_monitor

Progress = Callable[[str, int, int], None]  # what, done, total

WEIGHTS = ("shared", "embedded", "stripped")


@dataclass(frozen=True)
class BuildSettings:
    """How a bundle's engines are built.

    weights: "shared" makes the matrices inputs, bound to one copy on the device; "embedded" puts a
    copy into each engine; "stripped" leaves them out of the file and refits at load.
    optimization_level: the builder's, 0 to 5; None leaves it to TensorRT.
    plugins: False has the parser inline the operators' function bodies, as it does in fp32, which
    the plugins do not compute.
    """

    weights: str = "shared"
    optimization_level: int | None = None
    plugins: bool = True

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ArrowheadError(
                "weights", got=self.weights, expected=f"one of {WEIGHTS}", fix="pass one of them"
            )


def build_engine(
    folder: Path,
    bundle: Bundle,
    plan: Plan,
    graph: GraphSpec,
    settings: BuildSettings,
    progress: Progress | None = None,
) -> EngineMetadata:
    """Build the engine of one graph, or keep the one that is there; give its metadata.

    An engine is kept if it was built from the same files with the same settings and software. A new
    one, at engine_path, and its metadata, which says verified: False, are written aside and
    renamed, the metadata last. Raises ArrowheadError with TensorRT's reasons, and KeyboardInterrupt
    on Ctrl-C, with nothing written.
    """
    trt = usable_tensorrt()
    _check(trt, settings)
    plugin = load_plugins() if settings.plugins and bundle.dtype != "float32" else None
    started = time.perf_counter()
    trt.logger.clear()
    builder = trt.api.Builder(trt.logger)
    config = _config(trt, builder, settings, graph, bundle.batch_range)
    path = engine_path(folder, graph)
    known = {
        **_origin(folder, bundle, plan, graph),
        **_machine(trt),
        "batch": rows_of(bundle),
        "weights": settings.weights,
    }
    tuning = _tuning(trt, config)
    if kept := _kept(path, known, tuning, plugin):
        return kept
    # The parser owns memory that the network points to: it lives as long.
    network, parser = parse_graph(trt, builder, folder / graph.file)
    shared = share_weights(trt, network, graph) if settings.weights == "shared" else ()
    check_io(trt, network, graph, shared)
    operators = operators_found(trt, network, plan, graph)
    path.parent.mkdir(exist_ok=True)
    cache = None if trt.is_rtx else _TimingCache(config, path.parent)
    content = _serialize(trt, builder, network, config, graph, progress)
    metadata = EngineMetadata(
        engine_bytes=content.nbytes,
        engine_sha256=hashlib.sha256(content).hexdigest(),
        **known,
        plugin=plugin.identity if plugin and "plugin" in operators.values() else None,
        operators=operators,
        shared_weights=[spec.name for spec in shared],
        weights_bytes=_said(trt, "Total Weights Memory"),
        activation_bytes=_said(trt, "Total Activation Memory"),
        builder={**tuning, "timing_cache_sha256": None if cache is None else cache.save()},
        built=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
    )
    metadata_path(path).unlink(missing_ok=True)  # that of an engine about to be replaced
    atomic_write(path, content)
    save_metadata(metadata, path)
    return metadata


def _kept(
    path: Path, known: dict[str, Any], tuning: dict[str, Any], plugin: PluginLibrary | None
) -> EngineMetadata | None:
    """Give the metadata of an engine that a build would only make again, if there is one."""
    try:
        metadata = load_metadata(path)
        check_bytes(path, metadata)
    except ArrowheadError:
        return None
    as_plugins = "plugin" if plugin is not None else "function"
    same = (
        all(getattr(metadata, name) == value for name, value in known.items())
        and all(metadata.builder[name] == value for name, value in tuning.items())
        and set(metadata.operators.values()) <= {as_plugins}
        and (metadata.plugin is None or (plugin and metadata.plugin == plugin.identity))
    )
    return metadata if same else None


def usable_tensorrt() -> TensorRT:
    """Give the TensorRT that can build engines on this machine; ArrowheadError if there is none."""
    trt = tensorrt()
    if not trt.is_rtx and not torch.cuda.is_available():
        raise ArrowheadError(
            "building with TensorRT",
            got="no NVIDIA GPU",
            expected="the GPU that the engines are for",
            fix="build on that machine; TensorRT-RTX alone builds ahead of time, without one",
        )
    return trt


def _check(trt: TensorRT, settings: BuildSettings) -> None:
    """Refuse what this TensorRT cannot build, before the work."""
    if trt.is_rtx and settings.weights == "stripped":
        raise ArrowheadError(
            "--strip-weights",
            got=f"{TENSORRT_RTX} {trt.version}",
            expected="TensorRT: this one asks for a GPU and fails",
            fix="leave it out; --weights shared, the default, keeps matrices out of the files too",
        )


def _config(
    trt: TensorRT,
    builder: Any,
    settings: BuildSettings,
    graph: GraphSpec,
    batches: BatchRange | None,
) -> Any:
    config = builder.create_builder_config()
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    flags = trt.api.BuilderFlag
    config.clear_flag(flags.TF32)  # fp32 in a graph means fp32
    if settings.weights == "stripped":
        # REFIT_IDENTICAL: the engine may be tuned for these very weights, and takes no others.
        config.set_flag(flags.STRIP_PLAN)
        config.set_flag(flags.REFIT_IDENTICAL)
    if batches is not None:
        profile = builder.create_optimization_profile()
        for spec in graph.inputs:
            profile.set_shape(spec.name, *(shape_of(spec, rows) for rows in batches))
        config.add_optimization_profile(profile)
    return config


class _TimingCache:
    """Timings of tactics, kept beside the engines so that equal layers are timed once."""

    def __init__(self, config: Any, folder: Path) -> None:
        self._config = config
        major, minor = torch.cuda.get_device_capability()
        self._path = folder / f"timing_sm{major}{minor}.cache"
        old = self._path.read_bytes() if self._path.is_file() else b""
        # Refused where it is of another device or version: then this build starts a new one.
        if not config.set_timing_cache(config.create_timing_cache(old), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def save(self) -> str:
        """Write it, and give its sha256."""
        content = memoryview(self._config.get_timing_cache().serialize())
        atomic_write(self._path, content)
        return hashlib.sha256(content).hexdigest()


def _serialize(
    trt: TensorRT,
    builder: Any,
    network: Any,
    config: Any,
    graph: GraphSpec,
    progress: Progress | None,
) -> memoryview:
    def show(phases: Phases) -> None:
        if progress is not None:
            progress(f"{graph.file}: {phases.innermost}", int(100 * phases.share), 100)

    with interrupt_noted() as stopped:
        config.progress_monitor = progress_monitor(trt.api, show, stopped)
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ArrowheadError(
            f"engine of {graph.file}",
            got=last_error(trt),
            expected=f"an engine from {trt.flavour} {trt.version}",
            fix="out of memory: --weights shared; without the plugin library: make plugins",
        )
    return memoryview(serialized)


def _origin(folder: Path, bundle: Bundle, plan: Plan, graph: GraphSpec) -> dict[str, Any]:
    """What the engine was made from, and its inputs and outputs as bundle.json has them."""
    tensors = (*graph.inputs, *graph.outputs)
    return {
        "bucket": graph.bucket,
        "steps": step_ranges(plan, graph.bucket),
        "graph_sha256": file_sha256(folder / graph.file),
        "weights_sha256": bundle.weights_sha256,
        "plan_sha256": bundle.plan_sha256,
        "architecture": bundle.model["architecture"],
        "picture": [plan.height, plan.width],
        "scheduler": plan.sampler.scheduler,
        "num_steps": plan.steps,
        "dtype": bundle.dtype,
        "inputs": [tensor_entry(spec) for spec in graph.inputs],
        "outputs": [tensor_entry(spec) for spec in graph.outputs],
        "caches": [
            {**tensor_entry(spec), "bytes": tensor_bytes(spec, bundle.batch)}
            for spec in tensors
            if spec.name.startswith((CACHE_IN, CACHE_OUT))
        ],
    }


def _machine(trt: TensorRT) -> dict[str, Any]:
    """Which software built it and for which device; TensorRT-RTX builds for all that it runs on."""
    here = torch.cuda.is_available()
    capability = "{}.{}".format(*torch.cuda.get_device_capability()) if here else None
    return {
        "arrowhead": versions().get("arrowhead", "not installed as a package"),
        "tensorrt": {
            "flavour": trt.flavour,
            "version": trt.version,
            "bindings": trt.api.__version__,
        },
        "compute_capability": None if trt.is_rtx else capability,
        "device": torch.cuda.get_device_name() if here else None,
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
    }


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.split()[0] if asked.stdout.split() else None


def _tuning(trt: TensorRT, config: Any) -> dict[str, Any]:
    flags = trt.api.BuilderFlag.__members__.items()
    return {
        "optimization_level": config.builder_optimization_level,
        "flags": [name for name, flag in flags if config.get_flag(flag)],
    }


def _said(trt: TensorRT, what: str) -> int | None:
    """Read a size from the builder's log: without a GPU the engine itself cannot be asked."""
    for message in reversed(trt.logger.messages):
        if found := re.match(rf"{what}: (\d+) bytes", message):
            return int(found.group(1))
    return None
