"""ONNX Runtime's CUDA provider: its options, its stream beside PyTorch's, its arena of memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from plans.errors import ArrowheadError

PROVIDER = "CUDAExecutionProvider"

# Nodes on the CPU would copy to the host and back in every step; then there is no session.
NO_FALLBACK = ("session.disable_cpu_ep_fallback", "1")


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the one stream that all sessions of a device launch on.

    A session takes its stream when it is made, and never the default one.
    """
    return torch.cuda.Stream(device)


def provider_options(device: torch.device) -> dict[str, str]:
    """Give the provider's options for sessions on this device."""
    return {
        "device_id": str(device.index or 0),
        "user_compute_stream": str(side_stream(device).cuda_stream),
        # fp32 stays fp32, as in PyTorch.
        "use_tf32": "0",
        # Without it fp16 sums of squares are made in fp16.
        "enable_skip_layer_norm_strict_mode": "1",
    }


@cache
def share_device_arena(ort: Any, index: int) -> None:
    """Let all sessions on a device take activations from one arena: only one runs at a time."""
    from onnxruntime.capi import _pybind_state

    memory = ort.OrtMemoryInfo(
        "Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, index, ort.OrtMemType.DEFAULT
    )
    # 1 is kSameAsRequested: by default blocks double, and activations take half the device again.
    arena = _pybind_state.OrtArenaCfg({"arena_extend_strategy": 1})
    try:
        _pybind_state.create_and_register_allocator_v2(
            PROVIDER, memory, {"device_id": str(index)}, arena
        )
    except Exception as error:  # ONNX Runtime has no common base for its exceptions
        raise ArrowheadError(
            "ONNX Runtime's CUDA provider",
            got=str(error).strip().splitlines()[0],
            expected="a provider library that loads on this machine",
            fix="install the CUDA and cuDNN that its own message above names, in the versions that "
            "onnxruntime-gpu was built for",
        ) from error


def asynchronous(ort: Any) -> Any:
    """Give options of a run that returns as soon as all is launched."""
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def in_turn(launch: Callable[[], None], device: torch.device) -> None:
    """Launch on the sessions' stream, between what PyTorch's current one has and what it gets."""
    side, current = side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    launch()
    current.wait_stream(side)


def check_cuda(device: str) -> torch.device:
    """Give the device with its index; ArrowheadError where PyTorch has none: it has the buffers."""
    if not torch.cuda.is_available():
        raise ArrowheadError(
            f"device {device} on backend onnxruntime",
            got="no NVIDIA GPU, or a PyTorch without CUDA",
            expected="a GPU that PyTorch has too: it owns the buffers and the weights",
            fix="run with --device cpu, or install PyTorch's CUDA build",
        )
    found = torch.device(device)
    return found if found.index is not None else torch.device("cuda", torch.cuda.current_device())


def check_dlpack(ort_value: Any) -> None:
    """Refuse an ONNX Runtime whose values cannot be over PyTorch's memory on a device."""
    if not hasattr(ort_value, "from_dlpack"):
        raise ArrowheadError(
            "weights that ONNX Runtime's sessions share on CUDA",
            got="an OrtValue without from_dlpack",
            expected="one that takes PyTorch's tensors",
            fix="pip install -U onnxruntime-gpu, or pass --weights embedded: a copy a session",
        )
