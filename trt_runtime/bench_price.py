"""What a head costs in each mode on this GPU: a few mixes of heads timed, prices fitted to them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from plans.models import AttentionModule
from plans.prices import (
    Price,
    Prices,
    Shape,
    fit,
    load_prices,
    merged,
    save_prices,
    shape_of,
)
from plans.tiles import CACHED, FULL, TokenLayout, candidate_half_windows
from plugins.torch.library import build_id
from trt_runtime.attention_cases import KERNELS, Case, Mix
from trt_runtime.bench_attention import Problem, capture, require_gpu, time_rounds
from trt_runtime.doctor import device_name


def shapes_of(modules: Sequence[AttentionModule], rows: int) -> list[Shape]:
    """The different shapes of a model's attention modules."""
    return list(dict.fromkeys(shape_of(module, rows) for module in modules))


def shape_of_case(case: Case) -> Shape:
    module = AttentionModule("", case.heads, case.head_dim, case.layout, True)
    return shape_of(module, case.batch)


def price_mixes(shape: Shape, divisors: Sequence[int]) -> list[Mix]:
    """Mixes that prices are fitted to: each mode on all heads, and beside the others."""
    heads, third = shape.heads, shape.heads // 3
    windows = candidate_half_windows(_layout(shape), divisors)
    mixes = [Mix(heads, 0, 0, 0), Mix(0, 0, 0, heads), Mix(heads // 2, 0, 0, heads - heads // 2)]
    for window in windows:
        mixes += [Mix(0, heads, window, 0), Mix(third, heads - 2 * third, window, third)]
    return [mix for mix in dict.fromkeys(mixes) if mix.full + mix.arrow + mix.cached == heads]


def head_counts(shape: Shape) -> list[int]:
    """Heads whose projections are timed: all, and as a plan's pruned ones leave."""
    return sorted({max(1, shape.heads * part // 4) for part in (1, 2, 3, 4)})


def price(shape: Shape, mixes: Mapping[Mix, float], projections: Mapping[int, float]) -> Price:
    """Fit a shape's prices to milliseconds of mixes, and of q, k, v projections by heads."""
    attention = fit([_counts(mix) for mix in mixes], list(mixes.values()))
    heads = [{FULL: count} for count in projections]
    slope = fit(heads, list(projections.values()), constant=len(heads) > 1)
    return Price(shape, attention, slope[FULL])


def measure_prices(
    shapes: Sequence[Shape],
    *,
    divisors: Sequence[int] = (8, 16, 32),
    launches: int = 100,
    rounds: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
) -> Prices:
    """Time every shape; raise ArrowheadError without a GPU or the kernel library."""
    require_gpu("bench attention --price")
    prices = []
    for i, shape in enumerate(shapes):
        if progress is not None:
            progress(f"{shape.image_tokens} tokens, {shape.heads} heads", i, len(shapes))
        prices.append(price(shape, *_measure(shape, divisors, launches, rounds)))
        torch.cuda.empty_cache()
    return Prices(device_name("cuda"), build_id(), tuple(prices))


def complete(
    path: Path, shapes: Sequence[Shape], progress: Callable[[str, int, int], None] | None = None
) -> Prices:
    """Load a file of prices; shapes that it lacks are measured here first, and added to it."""
    known = load_prices(path) if path.is_file() else None
    have = {price.shape for price in known.prices} if known is not None else set()
    missing = [shape for shape in shapes if shape not in have]
    if known is not None and not missing:
        return known
    found = measure_prices(missing, progress=progress)
    found = found if known is None else merged(known, found)
    save_prices(found, path)
    return found


def prices_file(folder: Path) -> Path:
    """Where prices of this GPU and build of the kernel library are kept."""
    require_gpu("prices of this device")
    device = "".join(c if c.isalnum() else "-" for c in device_name("cuda"))
    return folder / "prices" / f"{device}-{build_id()}.json"


def _measure(
    shape: Shape, divisors: Sequence[int], launches: int, rounds: int
) -> tuple[dict[Mix, float], dict[int, float]]:
    """Milliseconds of the mixes and of the projections, timed in one rotation."""
    case = Case(shape.rows, shape.heads, shape.head_dim, _layout(shape), ())
    problem = Problem(case)
    mixes, counts = price_mixes(shape, divisors), head_counts(shape)
    runs = [problem.fused(mix, KERNELS["arrowhead"]) for mix in mixes]
    runs += [_projection(shape, heads) for heads in counts]
    times = time_rounds([capture(run) for run in runs], launches, rounds)
    medians = [statistics.median(samples) for samples in times]
    return (
        dict(zip(mixes, medians[: len(mixes)], strict=True)),
        dict(zip(counts, medians[len(mixes) :], strict=True)),
    )


def _projection(shape: Shape, heads: int, device: str = "cuda") -> Callable[[], Any]:
    """The q, k and v projections of so many heads, as the torch backend computes them."""
    width = shape.heads * shape.head_dim
    tokens = shape.rows * (shape.image_tokens + shape.text_tokens)
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
    weights = [
        torch.randn(heads * shape.head_dim, width, dtype=torch.bfloat16, device=device)
        for _ in range(3)
    ]

    def run() -> None:
        for weight in weights:
            F.linear(x, weight)

    return run


def _layout(shape: Shape) -> TokenLayout:
    return TokenLayout(shape.image_tokens, shape.text_tokens, shape.text_first, shape.block)


def _counts(mix: Mix) -> dict[int, int]:
    counts = {FULL: mix.full, mix.half_window: mix.arrow, CACHED: mix.cached}
    return {mode: heads for mode, heads in counts.items() if heads}


TABLE = ("rows", "tokens", "heads x dim", "mode", "ms a head", "with q, k, v", "of full")


def table(prices: Prices) -> list[tuple[str, ...]]:
    """Give the cells of every mode of every shape."""
    cells: list[tuple[str, ...]] = []
    for item in prices.prices:
        shape = item.shape
        for mode in sorted(item.attention, key=item.of, reverse=True):
            name = {FULL: "full", CACHED: "cached"}.get(mode, f"hw{mode}")
            cells.append(
                (
                    str(shape.rows),
                    f"{shape.image_tokens}+{shape.text_tokens}",
                    f"{shape.heads} x {shape.head_dim}",
                    name,
                    f"{item.attention[mode]:.4f}",
                    f"{item.of(mode):.4f}",
                    f"{item.of(mode) / item.of(FULL):.2f}",
                )
            )
    return cells
