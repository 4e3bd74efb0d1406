"""The plan on the diffusers transformer itself, behind the same protocol and the same buffers.

It is what parity is measured against, and runs wherever PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from plans.bundle import GraphSpec
from plans.plan import Plan
from plans.processors import BucketHeads, install
from trt_runtime.engine import CACHE_IN, CACHE_OUT, check_active, check_buffers, check_inactive
from trt_runtime.kernels import use_kernels


class TorchEngine:
    """One bucket of a plan (or the unpatched transformer, for `graph.bucket` None) in PyTorch.

    The attention processors are swapped in for the length of one run and swapped back after it,
    so several engines, and the pipeline itself, can use one copy of the weights.
    """

    def __init__(self, transformer: nn.Module, plan: Plan, graph: GraphSpec) -> None:
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self.device = next(transformer.parameters()).device
        self.transformer = transformer
        self._plan = plan
        self._name = "dense" if graph.bucket is None else f"bucket {graph.bucket}"
        self._heads: BucketHeads | None = None
        self._bucket = graph.bucket
        self._constants: dict[str, Tensor] = {}
        self._active = False

    def __enter__(self) -> Self:
        check_inactive(f"torch engine of {self._name}", self._active)
        if self._bucket is not None:
            use_kernels(self.device, next(self.transformer.parameters()).dtype)
            self._heads = BucketHeads(self._plan, self._bucket, self.device)
            install(self.transformer, self._plan.modules, self._heads)()  # checks, changes nothing
        self._constants = position_ids(self._plan, self.device)
        self._active = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._active, self._heads, self._constants = False, None, {}

    def bind(
        self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Callable[[], None]:
        check_active(f"torch engine of {self._name}", self._active)
        check_buffers(self._name, self.inputs, feeds, self.device)
        check_buffers(self._name, self.outputs, outputs, self.device)
        arguments = {n: t for n, t in feeds.items() if not n.startswith(CACHE_IN)}
        arguments |= self._constants
        caches = {n.removeprefix(CACHE_IN): t for n, t in feeds.items() if n not in arguments}
        writes = {n: t for n, t in outputs.items() if n.startswith(CACHE_OUT)}

        def run() -> None:
            heads = self._heads
            if heads is not None:
                heads.cache_in = caches
            outputs["sample"].copy_(self._forward(arguments))
            if heads is not None:
                for name, buffer in writes.items():
                    buffer.copy_(heads.cache_out[name.removeprefix(CACHE_OUT)])
                heads.cache_out = {}  # the activations are not kept between steps

        return run

    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.bind(feeds, outputs)()

    @torch.inference_mode()
    def _forward(self, arguments: Mapping[str, Any]) -> Tensor:
        if self._heads is None:
            return self.transformer(**arguments, return_dict=False)[0]
        undo = install(self.transformer, self._plan.modules, self._heads)
        try:
            return self.transformer(**arguments, return_dict=False)[0]
        finally:
            undo()


def position_ids(plan: Plan, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Give FLUX's img_ids [V, 3] (row and column of each packed latent) and txt_ids [T, 3].

    Empty for SD3, whose positions are part of its patch embedding.
    """
    if plan.model.architecture != "FluxTransformer2DModel":
        return {}
    packed = 2 * plan.vae_scale_factor  # one token is 2 x 2 latents
    rows, columns = plan.height // packed, plan.width // packed
    image = torch.zeros(rows, columns, 3, device=device)
    image[..., 1] = torch.arange(rows, device=device)[:, None]
    image[..., 2] = torch.arange(columns, device=device)[None, :]
    text = torch.zeros(plan.text_tokens, 3, device=device)
    return {"img_ids": image.reshape(-1, 3), "txt_ids": text}
