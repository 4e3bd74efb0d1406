"""A diffusers transformer, or a plan on it, under torch.compile and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from plans import sdpa as _register_sdpa  # noqa: F401  (the operators on CUDA without a library)
from plans.errors import ArrowheadError
from plans.head_order import head_orders, is_run, plan_by_places
from plans.plan import Plan, cache_flow
from plans.prepared import PreparedBucket, PreparedPlan
from plans.tiles import CACHED
from trt_runtime.kernels import use_kernels

COMPILE = ("auto", "none", "blocks", "model")
BLOCKS = ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")

# Graphs of one function: in a searched plan each block of each bucket may need one of its own.
_GRAPHS = 4096
_LIMITS = {"recompile_limit": _GRAPHS, "accumulated_recompile_limit": _GRAPHS}

# The stock transformer's attention: cuDNN's is the fastest on Hopper, and the first to be tried.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # fmt: skip


# One graph of a whole transformer costs this share of its blocks compiled one by one, each unlike
# the others: kernels that occur twice in a graph are made once. Measured with Inductor for CPUs,
# eight FLUX single blocks with 12 to 23 heads: 0.64 and 0.70 of the processor time.
_WHOLE = 0.7


def choose_compile(plan: Plan) -> str:
    """Say which way compiles a plan fastest; a step takes the same time either way.

    By blocks where many are alike, as where each module has as many heads of each mode; a searched
    plan, in which hardly two are, as a whole.
    """
    flow, distinct, total = cache_flow(plan), set(), 0
    placed = plan_by_places(plan, head_orders(plan))
    for index, bucket in enumerate(placed.buckets):
        blocks: dict[str, list[Any]] = {}
        for module in plan.modules:
            reads = [g for g in flow.reads(index) if g.module == module.name]
            writes = [len(g.heads) for g in flow.writes(index) if g.module == module.name]
            modes = bucket.modes[module.name]
            computed = [place for place, mode in enumerate(modes) if mode != CACHED]
            block = module.name.rpartition(".")[0]
            # Weights that are copied have other strides than slices.
            alike = (len(computed), is_run(computed), len(reads), *writes)
            blocks.setdefault(block, []).append(alike)
        total += len(blocks)
        distinct |= {(name.rpartition(".")[0], *parts) for name, parts in blocks.items()}
    return "blocks" if len(distinct) <= _WHOLE * total else "model"


class CompiledTransformer:
    """A transformer whose code and attributes stay as they are, bound to fixed buffers.

    compile: "blocks" compiles each class of blocks once for all blocks whose heads count alike;
    "model" the whole transformer, for each bucket; "none" nothing; "auto" is choose_compile's for a
    plan, and else "model". Errors of torch.compile (a graph break, too many graphs) are raised,
    never swallowed. cuda_graph: replay a captured step, so that the host makes one call; it reads
    weights where they lay, which stay alive there though the transformer is moved.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        compile: str,
        cuda_graph: bool,
        compiler: str | Callable[..., Any] = "inductor",
    ) -> None:
        if compile not in COMPILE:
            raise ArrowheadError(
                "compile", got=compile, expected=f"one of {COMPILE}", fix="pass one of them"
            )
        self._transformer = transformer
        self._compile = "model" if compile == "auto" else compile
        self._compiler = compiler
        self._cuda_graph = cuda_graph
        self._blocks = [
            m for m in transformer.modules()
            if compile == "blocks" and type(m).__name__ in BLOCKS
        ]  # fmt: skip
        self._compiled: dict[int, Callable[..., Any]] = {}
        self._weights = [w.detach() for w in (*transformer.parameters(), *transformer.buffers())]
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def bind(
        self, bucket: PreparedBucket, inputs: Mapping[str, Tensor], sample: Tensor
    ) -> Callable[[], None]:
        """Compile and capture a bucket on these buffers; give a call that runs it on them.

        It runs the bucket on the caches as they are: a bucket writes no cache that it reads, so
        running it once more changes nothing. What it gives allocates nothing with cuda_graph.
        """
        if self._cuda_graph:
            return self._capture(bucket, inputs, sample)

        def run() -> None:
            with self.installed(bucket):
                sample.copy_(self.call(inputs))

        if self._compile != "none":
            run()
        return run

    @torch.no_grad()
    def call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run what is installed, without a CUDA graph."""
        forward = self._transformer.forward
        if self._compile == "model":
            if 0 not in self._compiled:
                self._compiled[0] = self._torch_compile(forward)
            forward = self._compiled[0]
        # A graph for each class of blocks and bucket, and all of them are of one function.
        with torch._dynamo.config.patch(_LIMITS):
            return forward(**inputs, return_dict=False)[0]

    @contextmanager
    def installed(self, bucket: PreparedBucket) -> Iterator[None]:
        """Have the transformer be the bucket, compiled; what was there before comes back after."""
        name = "_compiled_call_impl"  # nn.Module calls it in the place of its own
        before = [block.__dict__.get(name) for block in self._blocks]
        with bucket.installed():
            try:
                for block in self._blocks:
                    if id(block) not in self._compiled:
                        self._compiled[id(block)] = self._torch_compile(block._call_impl)
                    block.__dict__[name] = self._compiled[id(block)]
                yield
            finally:
                for block, own in zip(self._blocks, before, strict=True):
                    block.__dict__.pop(name, None)
                    if own is not None:
                        block.__dict__[name] = own

    def close(self) -> None:
        """Drop compiled code and weights; what `bind` gave must be dropped with it."""
        self._compiled.clear()
        self._blocks, self._weights = [], []
        self._pool = self._stream = None

    def _torch_compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self._compiler)

    def _capture(
        self, bucket: PreparedBucket, inputs: Mapping[str, Tensor], sample: Tensor
    ) -> Callable[[], None]:
        with torch.cuda.device(sample.device), self.installed(bucket):
            # All graphs share their working memory: they run one after another.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._stream = stream = self._stream or torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    sample.copy_(self.call(inputs))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                sample.copy_(self.call(inputs))
        kept = (bucket, inputs, sample)  # a graph knows addresses alone

        def run() -> None:
            kept[0].check()
            graph.replay()

        return run


class CompiledStock(CompiledTransformer):
    """The transformer without a plan, compiled whole: what a plan is measured against."""

    def __init__(
        self,
        transformer: nn.Module,
        *,
        compile: str = "auto",
        cuda_graph: bool | None = None,
        compiler: str | Callable[..., Any] = "inductor",
    ) -> None:
        self._on_gpu = next(transformer.parameters()).device.type == "cuda"
        if cuda_graph is None:
            cuda_graph = self._on_gpu
        super().__init__(transformer, compile=compile, cuda_graph=cuda_graph, compiler=compiler)

    def call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if not self._on_gpu:
            return super().call(inputs)
        with sdpa_kernel(_ATTENTION, set_priority=True):
            return super().call(inputs)


class CompiledPlan(CompiledTransformer):
    """All steps of a plan on one transformer.

    prune, fuse_gelu, own_caches, move_heads: as in plans.prepared. cuda_graph: capture each
    bucket's step at its first call; None: on CUDA, where the kernel library is there. A step never
    allocates after its bucket's first call on CUDA graphs. Between steps the transformer computes
    what it did, to rounding; `close` puts its weights back bit for bit.
    """

    def __init__(
        self,
        transformer: nn.Module,
        plan: Plan,
        *,
        batch: int,
        compile: str = "auto",
        prune: bool = True,
        fuse_gelu: bool = True,
        own_caches: bool = True,
        move_heads: bool = True,
        cuda_graph: bool | None = None,
        compiler: str | Callable[..., Any] = "inductor",
    ) -> None:
        first = next(transformer.parameters())
        self.attention = use_kernels(first.device, first.dtype)
        if cuda_graph is None:
            cuda_graph = self.attention == "kernel library"
        if compile == "auto":
            compile = choose_compile(plan)
        super().__init__(transformer, compile=compile, cuda_graph=cuda_graph, compiler=compiler)
        self.plan = plan
        self.prepared = PreparedPlan(
            transformer, plan, batch=batch, prune=prune, fuse_gelu=fuse_gelu,
            own_caches=own_caches, move_heads=move_heads,
        )  # fmt: skip
        self._inputs: dict[str, Tensor] = {}
        self._sample: Tensor | None = None
        self._runs: dict[int, Callable[[], None]] = {}

    def step(self, step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run step `step` of the schedule; give the sample, good until the next call."""
        return self.run(self.plan.schedule[step], inputs)

    def run(self, bucket: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run one bucket on its own caches as they are."""
        self.prepared.use(bucket)
        if self._sample is None:
            self._inputs = {name: value.clone() for name, value in inputs.items()}
            self._sample = torch.empty_like(inputs["hidden_states"])
        for name, buffer in self._inputs.items():
            buffer.copy_(inputs[name])
        key = bucket if self.prepared.prune else 0
        if key not in self._runs:
            self._runs[key] = self.bind(self.prepared.buckets[bucket], self._inputs, self._sample)
        self._runs[key]()
        return self._sample

    def close(self) -> None:
        """Drop graphs, compiled code, prepared weights and caches."""
        super().close()
        self._runs.clear()
        self._inputs, self._sample = {}, None
        self.prepared.drop()
