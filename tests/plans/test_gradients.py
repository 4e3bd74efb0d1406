"""Gradients of the prediction: what a small error of a head's output moves, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plans.errors import ArrowheadError
from plans.gradients import Gradients
from plans.models import AttentionModule
from plans.plan import dense_plan
from plans.processors import install
from plans.scores import attention, counted
from tests import tiny
from tests.tiny_pipelines import flux_pipeline, sd3_pipeline, search


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline])
def test_gradients_tell_how_far_a_small_error_moves_the_prediction(make: Any) -> None:
    """Over probes their mean is that of moves by errors of the output's size, finite differences.

    With guidance the prediction is what the pipeline makes of both rows.
    """
    pipe, _ = make()
    model, scale = pipe.transformer, 3.0
    cfg = make is sd3_pipeline
    modules = dense_plan(tiny.random_plan(model)).modules
    inputs = tiny.inputs_of(model)
    before = [p.requires_grad for p in model.parameters()]

    total: Any = 0.0
    for seed in range(60):
        gradients = Gradients(model, modules, scale if cfg else None, seed)
        with gradients.attached(), torch.no_grad():
            model(**inputs)
        total = total + gradients.energies()["gradient"] / 60
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert not model.is_gradient_checkpointing and not model._forward_hooks

    def predict(strategy: Any) -> Tensor:
        undo = install(model, modules, strategy)
        with torch.no_grad():
            out = model(**inputs)[0].double()
        undo()
        return (1 - scale) * out[:1] + scale * out[1:] if cfg else out

    exact, first = predict(Noisy(None, 0, 0)), 0
    for module in (modules[0], modules[-1]):
        first = 0 if module is modules[0] else total.shape[1] - module.heads
        head = module.heads - 1
        moved = [
            float((predict(Noisy(module.name, head, seed)) - exact).square().sum())
            for seed in range(60)
        ]
        assert total[0, first + head] == pytest.approx(sum(moved) / 60 / Noisy.SIZE**2, rel=0.4)


class Noisy:
    """Full attention, with one head's counted output off by noise of its spread, times SIZE."""

    SIZE = 1e-3

    def __init__(self, name: str | None, head: int, seed: int) -> None:
        self._name, self._head = name, head
        self._generator = torch.Generator().manual_seed(seed)

    def computed_heads(self, module: AttentionModule) -> tuple[int, ...]:
        return tuple(range(module.heads))

    def attend(self, module: AttentionModule, q: Any, k: Any, v: Any) -> Tensor:
        out = attention(q, k, v)
        if module.name == self._name:
            seen = counted(module, out)[:, :, self._head]
            size = self.SIZE * (seen - seen.mean()).square().mean().sqrt()
            seen += size * torch.randn(seen.shape, generator=self._generator)
        return out


def test_a_backward_pass_needs_memory_that_is_told() -> None:
    pipe, prompts = flux_pipeline()
    told: list[str] = []
    for name in ("stream", "gradient"):
        search(pipe, prompts, error_weights=name, announce=told.append)
    assert "gradients" not in told[0] and "gradients" in told[1]


def test_gradients_that_overflow_are_refused() -> None:
    pipe, _ = flux_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1e25)
    gradients = Gradients(pipe.transformer, tiny.spec_of(pipe.transformer).modules, None)
    with gradients.attached(), torch.no_grad():
        pipe.transformer(**tiny.inputs_of(pipe.transformer))
    with pytest.raises(ArrowheadError, match="gradients of the heads' outputs .* in torch.float32"):
        gradients.energies()
