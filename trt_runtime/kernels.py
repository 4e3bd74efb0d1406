"""Which implementation of the two operators runs on a device."""

from __future__ import annotations

import os

import torch

from plugins.torch import attention, library  # `attention` registers plans.sdpa for CUDA


def use_kernels(device: torch.device | str, dtype: torch.dtype) -> str:
    """Have the operators run on the kernel library, where it is there for this device and dtype.

    Return what computes them: "kernel library", on other CUDA devices and in fp32 "sdpa", and
    elsewhere "reference". Raises ArrowheadError for a library that is named but does not load.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "reference"
    found = library.find_library() is not None or os.environ.get(library.VARIABLE)
    serves = dtype in attention.DTYPES and torch.cuda.get_device_capability(device) >= (8, 0)
    if not (found and serves):
        return "sdpa"
    attention.register()
    return "kernel library"
