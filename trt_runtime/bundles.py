"""Open a bundle folder: its engines on a backend, its transformer, its model's source."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from plans.bundle import Bundle, GraphSpec, check_bundle, load_bundle
from plans.errors import ArrowheadError
from plans.plan import Plan, dense_plan, load_plan
from trt_runtime.engine import DTYPES, Engine
from trt_runtime.onnxruntime_engine import OnnxRuntimeEngine, SessionSettings, open_weights
from trt_runtime.tensorrt_engine import ActivationMemory, DeviceWeights, TensorRTEngine
from trt_runtime.torch_engine import TorchEngine
from trt_runtime.transformer import TRANSFORMERS, ArrowheadTransformer

BACKENDS = ("onnxruntime", "tensorrt", "torch")


def open_bundle(folder: Path | str) -> tuple[Bundle, Plan]:
    """Read and check a bundle and the plan in it."""
    folder = Path(folder)
    bundle = load_bundle(folder)
    plan = load_plan(folder / bundle.plan_file)
    check_bundle(bundle, folder, plan)
    return bundle, plan


def load_transformer(
    folder: Path | str,
    *,
    backend: str = "onnxruntime",
    dense: bool = False,
    transformer: nn.Module | None = None,
    device: str = "cpu",
    threads: int = 0,
    weights: str = "shared",
    profile: Path | None = None,
    poison: bool = False,
) -> ArrowheadTransformer:
    """Open a bundle as a drop-in transformer; `attach` puts it into a pipeline.

    dense: the stock graph of the unpatched transformer at every step, for comparison.
    transformer: the diffusers transformer of backend "torch"; None loads the bundle's model.
    threads: per operator, 0 for one a core. weights: "shared" between the sessions, or "embedded"
    in each. profile: a folder for ONNX Runtime's traces.
    poison: fill the caches with NaN at each reset (tests).
    """
    folder = Path(folder)
    bundle, plan = open_bundle(folder)
    graphs = bundle.graphs if not dense else (bundle.dense,) if bundle.dense else ()
    if not graphs:
        raise ArrowheadError(
            f"bundle {folder}",
            got="no dense graph",
            expected="one, to compare with",
            fix="export the bundle again without --no-dense",
        )
    engines: dict[int, Engine] = {}
    if backend == "torch":
        module = transformer if transformer is not None else load_torch_transformer(bundle, folder)
        _check_dtype(module, bundle)
        for graph in graphs:
            engines[graph.bucket or 0] = TorchEngine(module.to(device), plan, graph)
    elif backend == "onnxruntime":
        warn_unverified(bundle, backend)
        settings = SessionSettings(threads, device, weights, profile)
        shared = open_weights(bundle, folder, device)
        for graph in graphs:
            engines[graph.bucket or 0] = OnnxRuntimeEngine(folder, graph, shared, settings)
    elif backend == "tensorrt":
        warn_unverified(bundle, backend)
        copy = DeviceWeights(folder / bundle.weights_file, device)
        memory = ActivationMemory(device)
        for graph in graphs:
            engines[graph.bucket or 0] = TensorRTEngine(folder, bundle, graph, copy, memory, device)
    else:
        raise _unknown(backend)
    kind = TRANSFORMERS[bundle.model["architecture"]]
    return kind(bundle, dense_plan(plan) if dense else plan, engines, poison=poison)


def open_engine(
    folder: Path | str,
    bundle: Bundle,
    graph: GraphSpec,
    *,
    backend: str = "onnxruntime",
    **options: Any,
) -> Engine:
    """Make the engine of one graph, not yet active. options: SessionSettings' fields."""
    if backend == "torch":
        raise ArrowheadError(
            "backend torch",
            got="a graph to make an engine of",
            expected="a backend that runs graphs: onnxruntime or tensorrt",
            fix="pass --backend onnxruntime; torch needs no build, and is what others are "
            "compared with",
        )
    if backend == "tensorrt":
        device = options.get("device", "cuda")
        copy = DeviceWeights(Path(folder) / bundle.weights_file, device)
        return TensorRTEngine(Path(folder), bundle, graph, copy, ActivationMemory(device), device)
    if backend != "onnxruntime":
        raise _unknown(backend)
    settings = SessionSettings(**options)
    weights = open_weights(bundle, Path(folder), settings.device)
    return OnnxRuntimeEngine(Path(folder), graph, weights, settings)


def model_source(bundle: Bundle, folder: Path | str) -> str:
    """Give the model's folder, or its hub id."""
    source = bundle.model.get("source")
    if not source:
        raise ArrowheadError(
            f"model of bundle {folder}",
            got="no source",
            expected="the folder or hub id it was exported from",
            fix="export the bundle with --model",
        )
    local = Path(folder) / source
    return str(local.resolve()) if local.exists() else source


def load_torch_transformer(bundle: Bundle, folder: Path | str) -> nn.Module:
    """Load the diffusers transformer the bundle was exported from, in the bundle's dtype."""
    import diffusers

    kind = getattr(diffusers, bundle.model["architecture"])
    source = model_source(bundle, folder)
    return load_pretrained(
        kind,
        source,
        subfolder="transformer",
        torch_dtype=DTYPES[bundle.dtype],
        revision=bundle.model.get("revision"),
    ).eval()


def load_pretrained(kind: Any, source: str, **options: Any) -> Any:
    """Call `from_pretrained`; ArrowheadError says what was looked for where."""
    try:
        # A hub id may be a long download, and shows its bars; a folder takes a second.
        with _no_bars() if Path(source).is_dir() else nullcontext():
            return kind.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        what = f"{source}/{options['subfolder']}" if "subfolder" in options else source
        raise ArrowheadError(
            f"model {source}",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}",
            expected=f"a folder in diffusers' format, or a hub id, at {what}",
            fix="check --model; a gated model needs `hf auth login`",
        ) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    import diffusers.utils.logging
    import transformers.utils.logging

    shown = [
        library
        for library in (diffusers.utils.logging, transformers.utils.logging)
        if library.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def warn_unverified(bundle: Bundle, backend: str) -> None:
    """Warn of engines that were built and never run."""
    never_run = [e.bucket for e in bundle.engines if e.backend == backend and not e.verified]
    if never_run:
        warnings.warn(
            f"engines of buckets {never_run} on {backend} were built but never run; "
            "run `arrowhead build` on this machine, then `arrowhead verify`",
            stacklevel=3,
        )


def _check_dtype(transformer: nn.Module, bundle: Bundle) -> None:
    got, expected = next(transformer.parameters()).dtype, DTYPES[bundle.dtype]
    if got != expected:
        raise ArrowheadError(
            "transformer dtype",
            got=got,
            expected=f"{expected}, as the bundle",
            fix=f"load the pipeline with torch_dtype={expected}",
        )


def _unknown(backend: str) -> ArrowheadError:
    return ArrowheadError(
        "backend",
        got=backend,
        expected=f"one of {', '.join(BACKENDS)}",
        fix="pass --backend with one of them; `arrowhead doctor` shows what this machine can run",
    )
