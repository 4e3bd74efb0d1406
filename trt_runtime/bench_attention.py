"""Time attention alone: the fused kernel on plans' mixes of heads, and what else can be had.

Every implementation runs from a CUDA graph, in rounds, in rotated order: long runs are limited by
power, so each must meet the card in the same state. FLOPs count only the pairs a mix keeps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from plans.tiles import CACHED, FULL, TokenLayout, kept_pairs
from plugins.torch import library
from plugins.torch.attention import launch, tasks_of

PER_GRAPH = 10  # launches captured together
COPY, DENSE = "memcpy", "all full"


@dataclass(frozen=True)
class Case:
    """Attention of one model at one size; B rows of one transformer call."""

    batch: int
    heads: int
    head_dim: int
    layout: TokenLayout


@dataclass(frozen=True)
class Mix:
    full: int
    arrow: int
    half_window: int
    cached: int

    @property
    def name(self) -> str:
        groups = ((self.full, "full"), (self.arrow, f"hw{self.half_window}"),
                  (self.cached, "cached"))  # fmt: skip
        used = [(n, what) for n, what in groups if n]
        return f"all {used[0][1]}" if len(used) == 1 else " + ".join(f"{n} {w}" for n, w in used)

    def modes(self) -> list[int]:
        """One mode per head; which head has which is shuffled, as in a searched plan."""
        modes = [FULL] * self.full + [self.half_window] * self.arrow + [CACHED] * self.cached
        random.Random(0).shuffle(modes)
        return modes


@dataclass(frozen=True)
class Row:
    case: str
    mix: str
    implementation: str
    share_kept: float
    ms: float
    tflops_effective: float


def _layout(image: int, text: int, text_first: bool) -> TokenLayout:
    return TokenLayout(image, text, text_first, block=128)


CASES = {
    "sd3-1k": Case(2, 24, 64, _layout(4096, 333, False)),
    "sd3-2k": Case(2, 24, 64, _layout(16384, 333, False)),
    "sd35-large-2k": Case(2, 38, 64, _layout(16384, 333, False)),
    "flux-1k": Case(1, 24, 128, _layout(4096, 512, True)),
    "flux-2k": Case(1, 24, 128, _layout(16384, 512, True)),
}
MIXES = {
    "sd3-1k": [Mix(5, 13, 1, 6)],
    "sd3-2k": [Mix(11, 9, 4, 4), Mix(7, 8, 4, 9), Mix(5, 9, 4, 10)],
    "sd35-large-2k": [Mix(9, 29, 4, 0)],
    "flux-1k": [Mix(5, 10, 1, 9)],
    "flux-2k": [Mix(16, 5, 4, 3), Mix(11, 8, 4, 5), Mix(6, 12, 4, 6), Mix(4, 16, 4, 4)],
}
KERNELS = {
    "arrowhead": library.AUTO,
    "arrowhead-sm90": library.SM90,
    "arrowhead-sm90-wide": library.SM90_WIDE,
    "arrowhead-mma": library.MMA_SYNC,
}
BASELINES = ("sdpa-cudnn", "sdpa-flash", "cudnn-uncached", "flex")


def mixes_of(name: str) -> list[Mix]:
    """The pure runs (all full, all arrow V/8, V/16, V/32 wide, all cached), then the mixes."""
    case = CASES[name]
    widths = [case.layout.image_tokens // (16 * k * case.layout.block) for k in (1, 2, 4)]
    pure = [Mix(case.heads, 0, 0, 0), *(Mix(0, case.heads, w, 0) for w in widths if w > 0)]
    return [*pure, Mix(0, 0, 0, case.heads), *MIXES[name]]


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
        return [x[:, :, : mix.full + mix.arrow].contiguous() for x in (self.q, self.k, self.v)]

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
        compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
        return partial(compiled, q, k, v, block_mask=mask, scale=self.scale)

    def share_kept(self, mix: Mix) -> float:
        layout = self.case.layout
        kept = sum(kept_pairs(layout, mode) for mode in mix.modes())
        return kept / (self.case.heads * layout.seq_len**2)

    def runners(self, mix: Mix, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
        """What is timed for one mix. Dense baselines belong to the mix in which all is full."""
        runners = {n: self.fused(mix, KERNELS[n]) for n in names if n in KERNELS}
        computed = mix.full + mix.arrow
        if mix.full == self.case.heads:
            for name, backend in (("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
                                  ("sdpa-flash", SDPBackend.FLASH_ATTENTION)):  # fmt: skip
                if name in names:
                    runners[name] = self.dense(computed, backend)
        elif "cudnn-uncached" in names and mix.cached and computed:
            runners["cudnn-uncached"] = self.dense(computed, SDPBackend.CUDNN_ATTENTION)
        if "flex" in names and computed:
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
    """Time all mixes of a case in one rotation."""
    problem = Problem(CASES[name])
    entries = [
        (mix, what, capture(run))
        for mix in mixes_of(name)
        for what, run in problem.runners(mix, implementations).items()
    ]
    times = time_rounds([graph for _, _, graph in entries], launches, rounds)
    case = problem.case
    dense_flop = 4.0 * case.batch * case.heads * case.layout.seq_len**2 * case.head_dim
    rows = []
    for (mix, what, _), samples in zip(entries, times, strict=True):
        share, ms = problem.share_kept(mix), statistics.median(samples)
        rows.append(Row(name, mix.name, what, share, ms, dense_flop * share / ms / 1e9))
    return rows


def table(rows: Sequence[Row]) -> str:
    """One line a row; speed-ups are over dense cuDNN and over this kernel's own dense time."""
    lines = [f"{'case':14} {'mix':28} {'implementation':20} {'kept':>6} {'ms':>8} {'TFLOP/s':>8} "
             f"{'x cuDNN':>8} {'of ideal':>8}"]  # fmt: skip
    for row in rows:
        cudnn = _ms(rows, row.case, "sdpa-cudnn")
        own = _ms(rows, row.case, row.implementation)
        speed_up = f"{cudnn / row.ms:8.2f}" if cudnn else " " * 8
        ideal = f"{own * row.share_kept / row.ms:8.2f}" if own else ""
        lines.append(
            f"{row.case:14} {row.mix:28} {row.implementation:20} {row.share_kept:6.3f} "
            f"{row.ms:8.4f} {row.tflops_effective:8.1f} {speed_up} {ideal}"
        )
    return "\n".join(lines)


def _ms(rows: Sequence[Row], case: str, implementation: str) -> float | None:
    wanted = (case, DENSE, implementation)
    return next((r.ms for r in rows if (r.case, r.mix, r.implementation) == wanted), None)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Effective TFLOP/s against the share kept: a flat line is speed that follows the work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for line in dict.fromkeys((row.case, row.implementation) for row in rows):
        points = sorted(
            (r.share_kept, r.tflops_effective)
            for r in rows
            if (r.case, r.implementation) == line and r.share_kept
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=" ".join(line))
    axes.set(xscale="log", xlabel="share of query/key pairs kept", ylabel="effective TFLOP/s")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = (*KERNELS, *BASELINES)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--implementation", nargs="+", choices=names, default=["arrowhead", *BASELINES]
    )
    parser.add_argument("--launches", type=int, default=200, help="a round, per implementation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="write a roofline plot here")


def run(arguments: argparse.Namespace) -> None:
    rows: list[Row] = []
    for name in arguments.case:
        rows += bench_case(name, arguments.implementation, arguments.launches, arguments.rounds)
        torch.cuda.empty_cache()
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                "cudnn": torch.backends.cudnn.version(), "launches": arguments.launches,
                "rounds": arguments.rounds}  # fmt: skip
    if arguments.json:
        document = {**versions, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)
    print(", ".join(f"{key} {value}" for key, value in versions.items()))
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
