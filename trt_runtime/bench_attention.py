"""Time attention alone: the fused kernel on plans' mixes of heads, and what else can be had.

Every implementation runs from a CUDA graph, in rounds, in rotated order: long runs are limited by
power, so each must meet the card in the same state. FLOPs count only the pairs a mix keeps.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from plans.errors import ArrowheadError, atomic_write
from plans.tiles import CACHED
from plugins.torch.attention import launch, tasks_of
from plugins.torch.library import load_library
from trt_runtime.attention_cases import CASES, DENSE, KERNELS, Case, Mix
from trt_runtime.doctor import device_name, git_commit, versions

PER_GRAPH = 10  # launches captured together
COPY = "memcpy"

Row = dict[str, Any]


def measure_attention(
    cases: Sequence[str],
    implementations: Sequence[str],
    *,
    launches: int,
    rounds: int,
    progress: Callable[[str, int, int], None] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Time the mixes of some CASES; raise ArrowheadError without a GPU or the kernel library.

    keep: given the report so far after every case.
    """
    require_gpu("bench attention")
    rows: list[Row] = []
    report = {
        "device": device_name("cuda"),
        "dtype": "bfloat16",
        "launches": launches,
        "rounds": rounds,
        "cudnn": torch.backends.cudnn.version(),
        "versions": versions(),
        "git_commit": git_commit(),
        "rows": rows,
    }
    for i, name in enumerate(cases):
        if progress is not None:
            progress(name, i, len(cases))
        rows += bench_case(name, implementations, launches, rounds)
        if keep is not None:
            keep(report)
        torch.cuda.empty_cache()
    return report


def require_gpu(what: str) -> None:
    """Load the kernel library; raise ArrowheadError without it or a GPU."""
    if not torch.cuda.is_available():
        raise ArrowheadError(
            what,
            got="no GPU that this PyTorch can use",
            expected="an NVIDIA GPU of compute capability 8.0 or higher",
            fix="run it where there is one; `arrowhead doctor` says what this machine has",
        )
    load_library()


class Problem:
    """Random q, k, v and cache of one case on the device, and runners for each implementation."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.scale = case.head_dim**-0.5
        shape = (case.batch, case.layout.seq_len, case.heads, case.head_dim)
        self.q, self.k, self.v, self.cache = (
            torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4)
        )
        self.out = torch.empty_like(self.q)

    def fused(self, mix: Mix, kernel: int) -> Callable[[], Any]:
        layout = self.case.layout
        computed = [m for m in mix.modes() if m != CACHED]
        ids = iter(range(len(computed)))
        cached = iter(range(len(computed), self.case.heads))
        source = [next(cached) if m == CACHED else next(ids) for m in mix.modes()]
        q, k, v = self.computed(mix)
        return partial(
            launch, q, k, v, self.out, tasks_of(computed, source), scale=self.scale,
            text_tokens=layout.text_tokens, text_first=layout.text_first, block=layout.block,
            cache=self.cache, kernel=kernel,
        )  # fmt: skip

    def computed(self, mix: Mix) -> list[Tensor]:
        """q, k, v of the heads that are not cached, as a plan's pruned projections give them."""
        return [x[:, :, : mix.computed].contiguous() for x in (self.q, self.k, self.v)]

    def dense(self, heads: int, backend: SDPBackend) -> Callable[[], Any]:
        q, k, v = (x[:, :, :heads].transpose(1, 2) for x in (self.q, self.k, self.v))

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, scale=self.scale)

        return run

    def flex(self, mix: Mix) -> Callable[[], Any]:
        """Compiled FlexAttention with the same block mask; cached heads are sliced out."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        layout = self.case.layout
        modes = [m for m in mix.modes() if m != CACHED]
        reach = torch.tensor([m if m >= 0 else layout.blocks for m in modes], device="cuda")
        first, last = layout.image_offset, layout.image_offset + layout.image_tokens

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            text = (q < first) | (q >= last) | (k < first) | (k >= last)
            blocks = (q - first) // layout.block - (k - first) // layout.block
            return text | (blocks.abs() <= reach[h])

        n = layout.seq_len
        mask = create_block_mask(visible, None, len(modes), n, n, device="cuda", _compile=True)
        q, k, v = (x[:, :, : len(modes)].transpose(1, 2) for x in (self.q, self.k, self.v))
        # One graph a shape, or an error: what it falls back to has all scores in memory.
        compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        return partial(compiled, q, k, v, block_mask=mask, scale=self.scale)

    def runners(self, mix: Mix, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
        """What is timed for one mix. Dense baselines belong to the mix in which all is full."""
        runners = {n: self.fused(mix, KERNELS[n]) for n in names if n in KERNELS}
        if mix.full == self.case.heads:
            for name, backend in (("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
                                  ("sdpa-flash", SDPBackend.FLASH_ATTENTION)):  # fmt: skip
                if name in names:
                    runners[name] = self.dense(mix.full, backend)
        elif "cudnn-uncached" in names and mix.cached and mix.computed:
            runners["cudnn-uncached"] = self.dense(mix.computed, SDPBackend.CUDNN_ATTENTION)
        if "flex" in names and mix.computed:
            runners["flex"] = self.flex(mix)
        if mix.cached == self.case.heads:
            runners[COPY] = partial(self.out.copy_, self.cache)
        return runners


def capture(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(PER_GRAPH):
            run()
    return graph


def time_rounds(
    graphs: Sequence[torch.cuda.CUDAGraph], launches: int, rounds: int
) -> list[list[float]]:
    """Milliseconds a launch, by graph and round; each round starts with another graph."""
    replays = max(1, launches // PER_GRAPH)
    times: list[list[float]] = [[] for _ in graphs]
    for i in range(rounds):
        order = [(j + i * len(graphs) // rounds) % len(graphs) for j in range(len(graphs))]
        for j in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(replays):
                graphs[j].replay()
            end.record()
            end.synchronize()
            times[j].append(begin.elapsed_time(end) / (replays * PER_GRAPH))
    return times


def bench_case(name: str, implementations: Sequence[str], launches: int, rounds: int) -> list[Row]:
    """Time all mixes of a case in one rotation: medians, TFLOP/s on the pairs each mix keeps."""
    torch._dynamo.reset()  # it keeps a limited number of FlexAttention's shapes
    case = CASES[name]
    problem = Problem(case)
    entries = [
        (mix, what, run)  # a graph does not own the tensors that its launches read
        for mix in case.mixes()
        for what, run in problem.runners(mix, implementations).items()
    ]
    times = time_rounds([capture(run) for _, _, run in entries], launches, rounds)
    dense_flop = 4.0 * case.batch * case.heads * case.layout.seq_len**2 * case.head_dim
    rows = []
    for (mix, what, _), samples in zip(entries, times, strict=True):
        share, ms = case.share_kept(mix), statistics.median(samples)
        rows.append(
            {
                "case": name,
                "mix": mix.name,
                "implementation": what,
                "share_kept": share,
                "ms": ms,
                "tflops_effective": dense_flop * share / ms / 1e9,
            }
        )
    return rows


HEADER = ("case", "mix", "implementation", "kept", "ms", "TFLOP/s", "x cuDNN", "of ideal")


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Give the cells of every row.

    x cuDNN: times as fast as dense cuDNN. of ideal: against this implementation's own dense time,
    scaled by the share of pairs kept.
    """
    dense = {(r["case"], r["implementation"]): r["ms"] for r in rows if r["mix"] == DENSE}
    cells: list[tuple[str, ...]] = []
    for row in rows:
        share, ms = row["share_kept"], row["ms"]
        cudnn = dense.get((row["case"], "sdpa-cudnn"))
        own = dense.get((row["case"], row["implementation"]))
        cells.append(
            (
                row["case"],
                row["mix"],
                row["implementation"],
                f"{share:.3f}",
                f"{ms:.4f}",
                f"{row['tflops_effective']:.1f}",
                f"{cudnn / ms:.2f}" if cudnn else "-",
                f"{own * share / ms:.2f}" if own else "-",
            )
        )
    return cells


def draw_roofline(rows: Sequence[Row], path: Path) -> None:
    """Draw effective TFLOP/s over the share kept: a flat line is speed that follows the work."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for line in dict.fromkeys((row["case"], row["implementation"]) for row in rows):
        points = sorted(
            (row["share_kept"], row["tflops_effective"])
            for row in rows
            if (row["case"], row["implementation"]) == line and row["share_kept"]
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=" ".join(line))
    axes.set(xscale="log", xlabel="share of query/key pairs kept", ylabel="effective TFLOP/s")
    axes.legend(fontsize="x-small")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, bbox_inches="tight")
    atomic_write(path, data.getvalue())
