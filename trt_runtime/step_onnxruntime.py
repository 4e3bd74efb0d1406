"""A plan's steps on ONNX Runtime for the bench of steps: exported, opened, bound, then deleted."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plans.bundle import Bundle, GraphSpec
from plans.errors import ArrowheadError
from plans.plan import Plan
from trt_runtime import onnxruntime_cuda as cuda
from trt_runtime.engine import CACHE_IN, CACHE_OUT, DTYPES, allocate
from trt_runtime.onnxruntime_engine import (
    OnnxRuntimeEngine,
    SessionSettings,
    check_provider,
    open_weights,
    runtime,
)
from trt_runtime.onnxruntime_operators import (
    BUILT,
    VARIABLE,
    find_operators,
    operators_for,
    register_operators,
)
from trt_runtime.step_memory import outside_bytes, weights_of_buckets
from trt_runtime.step_runners import Runner
from trt_runtime.torch_engine import TorchEngine

# Writes the buckets of a plan on a transformer as a bundle: (transformer, plan, folder, buckets).
Export = Callable[[nn.Module, Plan, Path, Sequence[int]], Bundle]

# Mean difference of a step's sample from backend torch's, as a share of the mean: rounding, over
# tens of layers. Wrong arithmetic gives about 1.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}

# Beside the weights: graphs, and constants such as tables of positions.
_SPARE = 2**28


@dataclass(frozen=True)
class GraphSettings:
    """How graphs are made for the bench, and the folder in which they are until a row is done."""

    export: Export
    folder: Path | None = None  # None: the system's for temporary files


def check_sessions(device: str, dtype: torch.dtype) -> None:
    """Refuse at once what would be refused by a session after minutes of compiling and export."""
    ort, library = runtime(), find_operators()
    check_provider(ort, device)
    if library is not None:
        register_operators(ort.SessionOptions(), library)
    if device == "cpu":
        if dtype == torch.bfloat16:
            raise ArrowheadError(
                "variant onnxruntime",
                got="bf16 on a CPU",
                expected="fp32 or fp16: the CPU provider multiplies no bf16",
                fix="pass --dtype fp32",
            )
        return
    cuda.check_dlpack(ort.OrtValue)
    cuda.share_device_arena(ort, cuda.check_cuda(device).index)  # loads the provider's library
    # Set to nothing it asks for the function bodies, which take memory of S x S.
    if library is None and VARIABLE not in os.environ and dtype != torch.float32:
        raise ArrowheadError(
            "variant onnxruntime",
            got="no operator library: attention would be the function bodies",
            expected=f"{BUILT[0].name}, with the attention kernels",
            fix=f"build it with `make plugins`, name it in {VARIABLE}, or set that to nothing for "
            "the function bodies, which fit small pictures alone",
        )


def check_disk(folder: Path | None, weight_bytes: int) -> int:
    """Give the bytes of disk that one row takes; ArrowheadError where there is less."""
    where = folder or Path(tempfile.gettempdir())
    needed, free = weight_bytes + _SPARE, shutil.disk_usage(where).free
    if free < needed:
        raise ArrowheadError(
            f"variant onnxruntime, which writes graphs and weights in {where}",
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB, given back after each row",
            fix="free space, or pass --folder on another disk",
        )
    return needed


class OnnxRuntimeSteps:
    """Some buckets of a plan as sessions on one copy of the weights, beside PyTorch's own copy."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        inputs: Mapping[str, Tensor],
        buckets: Sequence[int],
        graphs: GraphSettings,
        device: str,
        outside_before: int,
    ) -> None:
        self.plan = plan
        self._device = device
        self._outside_before = outside_before
        self._model_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        self._stack = ExitStack()
        self._runs: dict[int, Callable[[], None]] = {}
        self._feeds: dict[GraphSpec, dict[str, Tensor]] = {}
        self._caches: dict[str, Tensor] = {}
        self._sample: Tensor | None = None
        self.attention = "function bodies"
        try:
            folder = Path(
                self._stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="arrowhead-steps-", dir=graphs.folder)
                )
            )
            begin = time.perf_counter()
            bundle = graphs.export(model, plan, folder / "bundle", buckets)
            gc.collect()  # a traced graph holds itself, and so its weights on the host
            exported = time.perf_counter()
            self.measured: dict[str, Any] = {"export_seconds": exported - begin}
            self._open(bundle, folder / "bundle", inputs)
            self.open_seconds = time.perf_counter() - exported
        except BaseException:
            self.close()
            raise

    def _open(self, bundle: Bundle, folder: Path, inputs: Mapping[str, Tensor]) -> None:
        """Open and bind every graph on one set of buffers."""
        weights = open_weights(bundle, folder, self._device)
        settings = SessionSettings(device=self._device)
        used = {
            spec.name: spec
            for graph in bundle.graphs
            for spec in (*graph.inputs, *graph.outputs)
            if spec.name.startswith((CACHE_IN, CACHE_OUT))
        }
        for name, cache in allocate(list(used.values()), bundle.batch, self._device).items():
            self._caches.setdefault(_group(name), cache.normal_())
        first = bundle.graphs[0]
        own = {
            spec.name: inputs[spec.name].to(DTYPES[spec.dtype])
            for spec in first.inputs
            if not spec.name.startswith(CACHE_IN)
        }
        sample = [spec for spec in first.outputs if spec.name == "sample"]
        self._sample = allocate(sample, bundle.batch, self._device)["sample"]
        self.measured["weights_file_bytes"] = (folder / bundle.weights_file).stat().st_size
        for graph in bundle.graphs:
            if operators_for(graph, self._device) is not None:
                self.attention = "kernel library"
            engine = OnnxRuntimeEngine(folder, graph, weights, settings)
            self._stack.enter_context(engine)
            feeds, outputs = self._buffers(graph, own)
            assert graph.bucket is not None
            self._runs[graph.bucket] = engine.bind(feeds, outputs)
            self._feeds[graph] = feeds

    def _buffers(
        self, graph: GraphSpec, feeds: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        caches, sample = self._caches, self._sample
        assert sample is not None
        return (
            {
                spec.name: caches[_group(spec.name)]
                if spec.name.startswith(CACHE_IN)
                else feeds[spec.name]
                for spec in graph.inputs
            },
            {
                spec.name: sample if spec.name == "sample" else caches[_group(spec.name)]
                for spec in graph.outputs
            },
        )

    def check(self, model: nn.Module) -> None:
        """Run every bucket once; ArrowheadError where a sample is not backend torch's."""
        assert self._sample is not None
        errors = []
        for graph, feeds in self._feeds.items():
            assert graph.bucket is not None
            self._runs[graph.bucket]()
            outputs = allocate(graph.outputs, len(self._sample), self._device)
            with TorchEngine(model, self.plan, graph) as engine:
                engine.run(feeds, outputs)
            expected = outputs["sample"].float()
            difference = (self._sample.float() - expected).abs().mean() / expected.abs().mean()
            errors.append(float(difference))
        self.measured["torch_error"] = errors
        limit = TOLERANCE[self._sample.dtype]
        if not all(error <= limit for error in errors):  # not `max`, which may drop a NaN
            raise ArrowheadError(
                "steps on ONNX Runtime beside backend torch's",
                got=f"mean differences of {errors} of the mean",
                expected=f"at most {limit:g}, as rounding gives",
                fix="compare graph by graph: arrowhead verify --per-layer",
            )

    def told(self) -> str:
        """What there is to say before a step is timed."""
        told, errors = self.measured, self.measured.get("torch_error", [])
        differences = ", ".join(f"{error:.2g}" for error in errors) or "not known"
        return (
            f"exported in {told['export_seconds']:.0f} s, {told['weights_file_bytes'] / 1e9:.1f} "
            f"GB, opened in {self.open_seconds:.0f} s, {self.attention}; mean difference from "
            f"backend torch by bucket: {differences}"
        )

    def runner(self, name: str, bucket: int) -> Runner:
        def run() -> Tensor:
            self._runs[bucket]()
            assert self._sample is not None
            return self._sample

        return Runner(name, run, run, peak=self._peak)

    def _peak(self) -> int:
        """Most memory of these sessions; the arena is common, so of those before them too."""
        if not self._device.startswith("cuda"):
            return 0
        outside = outside_bytes() - self._outside_before
        return torch.cuda.max_memory_allocated() - self._model_bytes + outside

    def run_step(self, step: int) -> None:
        self._runs[self.plan.schedule[step]]()

    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches.values())

    def weights(self, one: int, one_on_device: int, prepared: int) -> dict[str, Any]:
        """Count the sessions' one copy, in the place of the transformer's, which they do not read.

        The file holds positions of this picture's size alone, so it may be smaller.
        """
        file, caches = self.measured["weights_file_bytes"], self.cache_bytes()
        told = weights_of_buckets(file, one_on_device, 0, caches, prepared - one_on_device)
        return told | {"prepared_device_bytes": prepared}

    def close(self) -> None:
        """Close the sessions and delete their files."""
        self._runs.clear()
        self._feeds.clear()
        self._caches.clear()
        self._sample = None
        self._stack.close()


def _group(name: str) -> str:
    """A cache's group, whether a graph reads or writes it."""
    return name.removeprefix(CACHE_IN).removeprefix(CACHE_OUT)
