"""Where a step's time goes: GPU kernels by class, from PyTorch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from plans.architectures import Architecture

CLASSES = ("projections", "attention", "MLP", "norms and elementwise", "copies", "other")
KERNELS = 20  # told by name
_COLOURS = ("#4878a8", "#c44e52", "#dd9c4b", "#6aa56e", "#8a7fb0", "#9a9a9a")
_ATTENTION = ("arrowhead", "attention", "flash", "fmha", "sdpa")
_MULTIPLY = ("gemm", "nvjet", "xmma", "cutlass", "cublas", "splitk")
_COPY = ("copy", "memcpy", "memset", "catarray", "triton_poi_fused_cat")
_SPANS = ("Torch-Compiled", "CompiledFx", "ProfilerStep", "## ")  # of time, not kernels
_MATMULS = ("aten::addmm", "aten::mm", "aten::_addmm_activation", "aten::bmm", "aten::linear")


def step_profile(
    run: Callable[[], Any], architecture: Architecture, total_ms: float
) -> dict[str, Any]:
    """Profile one step; milliseconds by class, and the kernels that take most of them.

    Both scaled to the time the step takes unprofiled. A matmul whose shapes the profiler lost is
    of class "other". On a CPU PyTorch's operators stand in the place of kernels.
    """
    on_gpu = torch.cuda.is_available() and next(iter(_outputs(run()))).is_cuda
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    width = architecture.config["num_attention_heads"] * architecture.config["attention_head_dim"]
    spent: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(list)
    for name, shapes, microseconds in _work(profiler.events() or [], on_gpu):
        kernels[name].append(microseconds)
        for kind, share in classify(name, shapes, width).items():
            spent[kind] += share * microseconds
    measured = sum(spent.values())
    scale = total_ms / measured if measured else 0.0
    most = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:KERNELS]
    return {
        "classes_ms": {kind: spent[kind] * scale for kind in CLASSES},
        "kernels": [
            {"name": name, "calls": len(times), "ms": sum(times) * scale} for name, times in most
        ],
    }


def classify(kernel: str, shapes: Sequence[Sequence[int]], width: int) -> dict[str, float]:
    """Say which class a kernel belongs to; FLUX's last projection takes attention and MLP at once.

    shapes: of the inputs of the PyTorch call that launched it; width: heads x head_dim.
    """
    name = kernel.lower()
    if any(word in name for word in _ATTENTION) and "gemm" not in name:
        return {"attention": 1.0}
    if _multiplies(name):
        return _of_matmul(shapes, width)
    if any(word in name for word in _COPY):
        return {"copies": 1.0}
    if name.startswith(("triton_", "void at::native", "aten::")) or "norm" in name:
        return {"norms and elementwise": 1.0}
    return {"other": 1.0}


def _multiplies(name: str) -> bool:
    return any(word in name for word in _MULTIPLY) or name in _MATMULS


def _of_matmul(shapes: Sequence[Sequence[int]], width: int) -> dict[str, float]:
    """Tell a projection from an MLP layer by its width of 4 x `width` on one side."""
    if not shapes:
        return {"other": 1.0}
    dims = [dim for shape in shapes if len(shape) in (2, 3) for dim in shape[-2:]]
    inner = [dim for dim in set(dims) if dims.count(dim) > 1 and 4 * width < dim <= 5 * width]
    if inner:
        return {"MLP": 4 * width / inner[0], "projections": 1 - 4 * width / inner[0]}
    return {"MLP" if 4 * width in dims else "projections": 1.0}


def _work(events: Sequence[Any], on_gpu: bool) -> Iterator[tuple[str, list[list[int]], float]]:
    """Give (name, shapes, microseconds) of kernels; shapes only where a matmul launched them."""
    if not on_gpu:
        for event in events:
            yield event.name, _shapes(event), float(event.self_cpu_time_total)
        return
    unexplained = 0.0
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if getattr(event, "is_user_annotation", False) or event.name.startswith(_SPANS):
                continue
            spent = float(event.time_range.elapsed_us())
            if _multiplies(event.name.lower()):
                unexplained += spent
            else:
                yield event.name, [], spent
            continue
        for kernel in event.kernels:
            if _multiplies(kernel.name.lower()):
                unexplained -= float(kernel.duration)
                yield kernel.name, _shapes(event), float(kernel.duration)
    yield "matmuls of unknown shape", [], max(0.0, unexplained)


def _shapes(event: Any) -> list[list[int]]:
    return [list(shape) for shape in event.input_shapes or [] if shape]


def _outputs(result: Any) -> Sequence[torch.Tensor]:
    return result if isinstance(result, tuple) else (result,)


def draw_classes(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one stacked bar a row, of the rows that were profiled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "classes_ms" in row]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.5 * len(rows)), layout="constrained")
    labels = [f"{row['backend']}\n{row['mix']}" for row in rows]
    left = [0.0] * len(rows)
    for kind, colour in zip(CLASSES, _COLOURS, strict=True):
        widths = [row["classes_ms"][kind] for row in rows]
        if any(widths):
            axes.barh(labels, widths, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
