"""A plan on the diffusers transformer under torch.compile, one CUDA graph for each bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plans import sdpa as _register_sdpa  # noqa: F401  (the operators on CUDA without a library)
from plans.errors import ArrowheadError
from plans.plan import Plan
from plans.prepared import PreparedPlan
from trt_runtime.kernels import use_kernels

COMPILE = ("none", "blocks", "model")
_GRAPHS = 256
BLOCKS = ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")


class CompiledPlan:
    """All steps of a plan on one transformer, whose weights, code and attributes stay as they are.

    compile: "blocks" compiles each class of blocks once for all blocks whose heads count alike;
    "model" the whole transformer, for each bucket; "none" nothing. prune, fuse_gelu: as in
    plans.prepared. cuda_graph: capture each bucket's step at its first call; None: on CUDA, where
    the kernel library is there. A step never allocates after its bucket's first call on CUDA
    graphs. Errors of torch.compile (a graph break, too many graphs) are raised, never swallowed.
    """

    def __init__(
        self,
        transformer: nn.Module,
        plan: Plan,
        *,
        batch: int,
        compile: str = "blocks",
        prune: bool = True,
        fuse_gelu: bool = True,
        cuda_graph: bool | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        if compile not in COMPILE:
            raise ArrowheadError(
                "compile", got=compile, expected=f"one of {COMPILE}", fix="pass one of them"
            )
        first = next(transformer.parameters())
        self.attention = use_kernels(first.device, first.dtype)
        self.plan = plan
        self.prepared = PreparedPlan(
            transformer, plan, batch=batch, prune=prune, fuse_gelu=fuse_gelu
        )
        self._transformer = transformer
        self._compile = compile
        self._backend = backend
        if cuda_graph is None:
            cuda_graph = self.attention == "kernel library"
        self._cuda_graph = cuda_graph
        self._compiled: dict[int, Callable[..., Any]] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._inputs: dict[str, Tensor] = {}
        self._sample: Tensor | None = None

    def step(self, step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run step `step` of the schedule; give the sample, good until the next call."""
        return self.run(self.plan.schedule[step], inputs)

    def run(self, bucket: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run one bucket on the caches as they are."""
        self.prepared.use(bucket)
        if not self._cuda_graph:
            with self.installed(bucket):
                return self.call(bucket, inputs)
        self._copy(inputs)
        key = bucket if self.prepared.prune else 0
        if key not in self._graphs:
            self._capture(key)
        self._graphs[key].replay()
        assert self._sample is not None
        return self._sample

    @torch.no_grad()
    def call(self, bucket: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run an installed bucket without its CUDA graph."""
        forward = self._transformer.forward
        if self._compile == "model":
            if bucket not in self._compiled:
                self._compiled[bucket] = self._torch_compile(forward)
            forward = self._compiled[bucket]
        # A graph for each class of blocks and bucket, and all of them are of one function.
        with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
            return forward(**inputs, return_dict=False)[0]

    @contextmanager
    def installed(self, bucket: int) -> Iterator[None]:
        """Have the transformer be the bucket, compiled; what was there before comes back after."""
        blocks = []
        if self._compile == "blocks":
            blocks = [m for m in self._transformer.modules() if type(m).__name__ in BLOCKS]
        with self.prepared.buckets[bucket].installed():
            try:
                for block in blocks:
                    if id(block) not in self._compiled:
                        self._compiled[id(block)] = self._torch_compile(block._call_impl)
                    block.__dict__["_compiled_call_impl"] = self._compiled[id(block)]
                yield
            finally:
                for block in blocks:
                    block.__dict__.pop("_compiled_call_impl", None)

    def _torch_compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self._backend)

    def _copy(self, inputs: Mapping[str, Tensor]) -> None:
        if not self._inputs:
            self._inputs = {name: value.clone() for name, value in inputs.items()}
        for name, buffer in self._inputs.items():
            if buffer is not inputs[name]:
                buffer.copy_(inputs[name])

    def _capture(self, bucket: int) -> None:
        """Run a bucket until it is compiled, then capture it. Runs it on the caches: harmless."""
        with self.installed(bucket):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    sample = self.call(bucket, self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            if self._sample is None:
                self._sample = sample.clone()
            del sample
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                self._sample.copy_(self.call(bucket, self._inputs))
        self._graphs[bucket] = graph

    def close(self) -> None:
        """Drop graphs, compiled code, prepared weights and caches."""
        self._graphs.clear()
        self._compiled.clear()
        self._inputs, self._sample = {}, None
        self.prepared.buckets.clear()
        self.prepared.caches.clear()
