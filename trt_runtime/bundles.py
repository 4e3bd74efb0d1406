"""Open a bundle folder: its engines on a backend, its transformer, its model's source."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from plans.bundle import Bundle, GraphSpec, check_bundle, load_bundle
from plans.errors import ArrowheadError
from plans.plan import Plan, dense_plan, load_plan
from trt_runtime.compiled_engine import CompiledEngine, CompiledModel
from trt_runtime.device_weights import DeviceWeights
from trt_runtime.engine import DTYPES, Engine
from trt_runtime.live import live_bundle
from trt_runtime.onnxruntime_engine import OnnxRuntimeEngine, SessionSettings, open_weights
from trt_runtime.tensorrt_engine import ActivationMemory, TensorRTEngine
from trt_runtime.torch_engine import TorchEngine
from trt_runtime.transformer import TRANSFORMERS, ArrowheadTransformer

BACKENDS = ("onnxruntime", "tensorrt", "torch", "torch-compile")
TORCH_BACKENDS = ("torch", "torch-compile")  # they run the transformer itself, not graphs


def open_bundle(folder: Path | str) -> tuple[Bundle, Plan]:
    """Read and check a bundle and the plan in it."""
    folder = Path(folder)
    bundle = load_bundle(folder)
    plan = load_plan(folder / bundle.plan_file)
    check_bundle(bundle, folder, plan)
    return bundle, plan


def load_transformer(
    folder: Path | str | None = None,
    *,
    plan: Plan | Path | str | None = None,
    batch: int | None = None,
    backend: str | None = None,
    dense: bool = False,
    transformer: nn.Module | None = None,
    device: str | None = None,
    threads: int = 0,
    weights: str = "shared",
    profile: Path | None = None,
    poison: bool = False,
    **compiled: Any,
) -> ArrowheadTransformer:
    """Open a bundle as a drop-in transformer; `attach` puts it into a pipeline.

    plan: in place of a bundle, with a diffusers `transformer` to run it on; batch: rows of one call
    of it (None: one picture's). backend: "onnxruntime" (None), "tensorrt", or in PyTorch "torch"
    (attention processors, uncompiled) or "torch-compile" (prepared weights, torch.compile, CUDA
    graphs). For a plan None is "torch-compile" on a GPU, else "torch".
    dense: the stock graph of the unpatched transformer at every step, for comparison.
    transformer: what PyTorch's backends run; None loads the bundle's model. device: "cpu" (None),
    "cuda"; for a transformer that is given None leaves it where it is. threads: per operator, 0
    for one a core. weights: "shared" between the sessions, or "embedded" in each. profile: a folder
    for ONNX Runtime's traces. poison: fill the caches with NaN at each reset (tests).
    compiled: options of torch-compile, as trt_runtime.torch_compiled.CompiledPlan has them.
    """
    folder = None if folder is None else Path(folder)
    bundle, plan, backend = _opened(folder, plan, transformer, batch, backend)
    graphs = bundle.graphs if not dense else (bundle.dense,) if bundle.dense else ()
    if not graphs:
        raise ArrowheadError(
            f"bundle {folder}",
            got="no dense graph",
            expected="one, to compare with",
            fix="export the bundle again without --no-dense",
        )
    if compiled and backend != "torch-compile":
        raise ArrowheadError(
            f"options {', '.join(compiled)}",
            got=f"backend {backend}",
            expected="backend torch-compile, which alone has them",
            fix="drop them, or pass backend='torch-compile'",
        )
    made: list[Engine] = []
    if backend in TORCH_BACKENDS:
        module = _module(bundle, folder, transformer, device)
        if backend == "torch":
            made += [TorchEngine(module, plan, graph) for graph in graphs]
        else:
            shared = CompiledModel(module, plan, bundle.batch, dense=dense, **compiled)
            made += [CompiledEngine(shared, graph) for graph in graphs]
    else:
        assert folder is not None
        settings = SessionSettings(threads, device or "cpu", weights, profile)
        made += _graph_engines(folder, bundle, graphs, backend, settings)
    engines = {graph.bucket or 0: engine for graph, engine in zip(graphs, made, strict=True)}
    kind = TRANSFORMERS[bundle.model["architecture"]]
    return kind(bundle, dense_plan(plan) if dense else plan, engines, poison=poison)


def _opened(
    folder: Path | None,
    plan: Plan | Path | str | None,
    transformer: nn.Module | None,
    batch: int | None,
    backend: str | None,
) -> tuple[Bundle, Plan, str]:
    """Give bundle, plan and backend; of a plan alone, what its bundle would say."""
    if (folder is None) == (plan is None):
        raise ArrowheadError(
            "what to run",
            got="neither a bundle nor a plan" if folder is None else "both a bundle and a plan",
            expected="one of them",
            fix="pass a bundle folder, or plan= with a transformer",
        )
    if folder is not None:
        return *open_bundle(folder), backend or "onnxruntime"
    if transformer is None:
        raise ArrowheadError(
            "transformer of the plan",
            got="none",
            expected="the diffusers transformer to run it on",
            fix="pass transformer=pipe.transformer, or attach(pipe, plan=...)",
        )
    assert plan is not None
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    on_gpu = next(transformer.parameters()).device.type == "cuda"
    backend = backend or ("torch-compile" if on_gpu else "torch")
    if backend not in TORCH_BACKENDS:
        raise ArrowheadError(
            f"backend {backend}",
            got="a plan",
            expected="a bundle, whose graphs it runs",
            fix="export the plan first (arrowhead export), or use backend torch-compile",
        )
    return live_bundle(plan, transformer, batch), plan, backend


def _module(
    bundle: Bundle, folder: Path | None, transformer: nn.Module | None, device: str | None
) -> nn.Module:
    """Give the transformer that PyTorch's backends run, where it is to run."""
    if transformer is None:
        assert folder is not None
        return load_torch_transformer(bundle, folder).to(device or "cpu")
    _check_dtype(transformer, bundle)
    return transformer if device is None else transformer.to(device)


def _graph_engines(
    folder: Path,
    bundle: Bundle,
    graphs: Sequence[GraphSpec],
    backend: str,
    settings: SessionSettings,
) -> list[Engine]:
    """Make the engines of the backends that run a bundle's graphs."""
    if backend == "onnxruntime":
        warn_unverified(bundle, backend)
        shared = open_weights(bundle, folder, settings.device)
        return [OnnxRuntimeEngine(folder, graph, shared, settings) for graph in graphs]
    if backend == "tensorrt":
        warn_unverified(bundle, backend)
        device = settings.device
        copy = DeviceWeights(folder / bundle.weights_file, device)
        memory = ActivationMemory(device)
        return [TensorRTEngine(folder, bundle, graph, copy, memory, device) for graph in graphs]
    raise _unknown(backend)


def open_engine(
    folder: Path | str,
    bundle: Bundle,
    graph: GraphSpec,
    *,
    backend: str = "onnxruntime",
    **options: Any,
) -> Engine:
    """Make the engine of one graph, not yet active. options: SessionSettings' fields."""
    if backend in TORCH_BACKENDS:
        raise ArrowheadError(
            f"backend {backend}",
            got="a graph to make an engine of",
            expected="a backend that runs graphs: onnxruntime or tensorrt",
            fix="pass --backend onnxruntime; PyTorch needs no build, and torch is what others are "
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
