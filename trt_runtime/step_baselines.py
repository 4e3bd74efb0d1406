"""PyTorch without a plan, as people run it: what every row of the bench of steps is beside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from plans.errors import ArrowheadError
from trt_runtime.step_runners import BASELINES, EAGER, Runner, cudnn_attention
from trt_runtime.torch_compiled import BLOCKS


class Baselines:
    """The stock transformer on one set of inputs; blocks compiled one by one are kept."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], on_gpu: bool) -> None:
        self._model, self._inputs, self._on_gpu = model, inputs, on_gpu
        self._blocks: dict[int, Callable[..., Any]] = {}

    def runner(self, name: str) -> Runner:
        forward: Callable[..., Any] = self._model.forward
        scope: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        if name == "torch.compile":
            forward = torch.compile(forward, dynamic=False)
        elif name == "torch.compile-max-autotune":
            forward = torch.compile(forward, dynamic=False, mode="max-autotune")
        elif name == "torch.compile-blocks":
            scope = self._compiled_blocks
        elif name != EAGER:
            raise ArrowheadError(
                "baseline", got=name, expected=f"one of {', '.join(BASELINES)}", fix="pass those"
            )

        def run() -> Tensor:
            with torch.no_grad(), cudnn_attention(self._on_gpu), scope():
                return forward(**self._inputs, return_dict=False)[0]

        return Runner(name, run, run)

    @contextmanager
    def _compiled_blocks(self) -> Iterator[None]:
        blocks = [m for m in self._model.modules() if type(m).__name__ in BLOCKS]
        for block in blocks:
            if id(block) not in self._blocks:
                self._blocks[id(block)] = torch.compile(block._call_impl, dynamic=False)
            block.__dict__["_compiled_call_impl"] = self._blocks[id(block)]
        try:
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("_compiled_call_impl", None)
