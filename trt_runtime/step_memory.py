"""What a plan takes of a device's memory, counted and as the device tells it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def used_bytes(on_gpu: bool) -> int:
    """Memory of the device that is taken (cudaMemGetInfo), PyTorch's free blocks not counted.

    0 where there is no GPU. Other processes on the device count too.
    """
    if not on_gpu:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def outside_bytes() -> int:
    """Memory of the GPU that is taken and not PyTorch's: of libraries, and of other processes."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def weight_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def weights_of_buckets(
    one: int, one_on_device: int, copied: int, cache_bytes: int, prepared_on_device: int
) -> dict[str, Any]:
    """Say how much more all buckets of a plan take than the weights of one.

    prepared_on_device: what the device had less after the buckets were made, caches among it.
    """
    measured = one_on_device + prepared_on_device - cache_bytes
    return {
        "weight_bytes": one,
        "copied_weight_bytes": copied,
        "weights_ratio": (one + copied) / one,
        "weight_device_bytes": one_on_device,
        "prepared_device_bytes": prepared_on_device,
        "measured_weights_ratio": measured / one_on_device if one_on_device else None,
    }
