"""A bundle's weights file on a device, once for all engines that read it there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from plans.bundle import WeightSpec

ALIGNMENT = 256  # bytes, of every address that an engine is given


class DeviceWeights:
    """The bundle's weights file on the device, once, for all engines that take it as inputs."""

    def __init__(self, path: Path, device: torch.device | str) -> None:
        self._path = path
        self._device = torch.device(device)
        self._bytes: Tensor | None = None
        self._copies: dict[WeightSpec, Tensor] = {}

    def bytes_of(self, weight: WeightSpec) -> Tensor:
        """Give one weight's bytes, uint8 [nbytes]; the file is copied at the first call."""
        if self._bytes is None:
            size = self._path.stat().st_size
            mapped = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.uint8)
            self._bytes = mapped.to(self._device)
        found = self._bytes[weight.offset : weight.offset + weight.nbytes]
        if found.data_ptr() % ALIGNMENT == 0:
            return found
        # Rows of a matrix may start anywhere.
        if weight not in self._copies:
            self._copies[weight] = found.clone()
        return self._copies[weight]
