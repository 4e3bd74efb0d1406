"""Weights of errors: what heads add to the residual stream, head by head, and who uses them."""

from __future__ import annotations

from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plans.bounds import Bounds
from plans.carry import carry_plan
from plans.errors import ArrowheadError
from plans.gradients import Gradients
from plans.importance import ERROR_WEIGHTS, Energies, error_weights
from plans.models import AttentionModule
from plans.plan import Plan, check_plan, dense_plan
from plans.processors import install
from plans.runs import Runs, Scratch
from plans.search import METRIC, measure, measure_plan
from plans.strategies import MeasureHeads
from plans.tiles import CACHED
from tests import tiny
from tests.tiny_pipelines import STEPS, flux_pipeline, sd3_pipeline, search

WEIGHTED = [name for name in ERROR_WEIGHTS if name != "head"]


class Watched(MeasureHeads):
    """Keeps the heads' outputs [B, S, H, D] of the modules."""

    def __init__(self, plan: Plan, energies: Energies) -> None:
        super().__init__(plan, None, energies=energies)
        self.merged: dict[str, Tensor] = {}

    def attend(
        self, module: AttentionModule, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        self.merged[module.name] = super().attend(module, q, k, v)
        return self.merged[module.name]


def _run(model: Any) -> tuple[Plan, Watched, Energies, dict[str, tuple[Tensor, Tensor]]]:
    """One step in full; with it every adaptive norm's stream and what its linear layer made."""
    plan = dense_plan(tiny.random_plan(model))
    energies = Energies(model, plan.modules, plan.steps)
    strategy = Watched(plan, energies)
    norms: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(norm: Any, args: Any, kwargs: Any, output: Any) -> None:
            norms[name] = args[0], norm.linear(norm.silu(kwargs["emb"]))

        return hook

    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in model.named_modules()
        if "Zero" in type(module).__name__
    ]
    undo = install(model, plan.modules, strategy)
    with energies.attached(), torch.no_grad():
        for step in range(plan.steps):
            strategy.begin_step(step)
            model(**tiny.inputs_of(model, seed=step))
    undo()
    for handle in handles:
        handle.remove()
    return plan, strategy, energies, norms


def _alone(layer: nn.Linear, rows: Tensor, head: int, head_dim: int, gate: Tensor) -> float:
    """Energy of one head's part of the layer's output, gated; the layer may have more inputs."""
    part = slice(head * head_dim, (head + 1) * head_dim)
    inputs = rows.new_zeros(*rows.shape[:2], layer.in_features)
    inputs[:, :, part] = rows[:, :, head]
    assert layer.bias is not None
    return float(((layer(inputs) - layer.bias) * gate[:, None]).double().square().sum())


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny.tiny_sd3, tiny.tiny_flux])
def test_energies_are_those_of_heads_projected_one_by_one(make: Any) -> None:
    model = make()
    plan, strategy, energies, norms = _run(model)
    found = energies.energies()
    assert found["added"].shape == (plan.steps, sum(m.heads for m in plan.modules))
    kinds, first = set(), 0
    for module in plan.modules:
        block_name, _, own = module.name.rpartition(".")
        block, layout, merged = (
            model.get_submodule(block_name), module.layout, strategy.merged[module.name]
        )  # fmt: skip
        image = merged.narrow(1, layout.image_offset, layout.image_tokens)
        text = merged.narrow(1, layout.text_offset, layout.text_tokens)
        dim = block.attn.to_q.in_features
        if "single" in block_name:
            stream, made = norms[f"{block_name}.norm"]
            gate = made[:, 2 * dim :]
            if not module.text_output:
                merged = image
                stream = stream.narrow(1, layout.image_offset, layout.image_tokens)
            whole = [stream]
            parts = [(block.proj_out, merged, gate)]
        else:
            stream, made = norms[f"{block_name}.norm1"]
            chunk = 8 if own == "attn2" else 2
            gate = made[:, chunk * dim : (chunk + 1) * dim]
            parts, whole = [(getattr(block, own).to_out[0], image, gate)], [stream]
            if own == "attn" and module.text_output:
                stream, made = norms[f"{block_name}.norm1_context"]
                parts.append((block.attn.to_add_out, text, made[:, 2 * dim : 3 * dim]))
                whole.append(stream)
        kinds.add((own, "single" in block_name, module.text_output))
        want = [
            sum(_alone(layer, rows, head, module.head_dim, gate) for layer, rows, gate in parts)
            for head in range(module.heads)
        ]
        rows = slice(first, first + module.heads)
        np.testing.assert_allclose(found["added"][-1, rows], want, rtol=1e-4)
        energy = sum(float(x.double().square().sum()) for x in whole)
        np.testing.assert_allclose(found["stream"][-1, rows], energy, rtol=1e-5)
        first += module.heads
    assert len(kinds) == 3  # attn, attn2 and discarded text; double, single and discarded text
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("make", [tiny.tiny_sd3, tiny.tiny_flux])
def test_weights_that_are_offloaded_layer_by_layer_are_read(make: Any) -> None:
    model = make()
    plan, _, energies, _ = _run(model)
    told = energies.energies()
    gradients = Gradients(model, plan.modules, None)
    with gradients.attached(), torch.no_grad():
        model(**tiny.inputs_of(model))
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    _, _, energies, _ = _run(model)
    for name, found in energies.energies().items():
        np.testing.assert_allclose(found, told[name], rtol=1e-5)
    again = Gradients(model, plan.modules, None)
    with again.attached(), torch.no_grad():
        model(**tiny.inputs_of(model))
    want = gradients.energies()["gradient"]
    np.testing.assert_allclose(again.energies()["gradient"], want, rtol=1e-4)


def _energies(seed: int = 0) -> tuple[dict[str, np.ndarray], list[AttentionModule]]:
    modules = list(tiny.spec_of(tiny.tiny_flux()).modules)
    rng = np.random.default_rng(seed)
    rows = sum(module.heads for module in modules)
    stream = np.repeat(rng.uniform(1, 9, (4, len(modules))), modules[0].heads, axis=1)
    added, gradient = rng.uniform(0.1, 1, (2, 4, rows))
    return {"added": added, "stream": stream, "gradient": gradient}, modules


def test_weights_are_shares_of_energy() -> None:
    energies, modules = _energies()
    sigmas = (1.0, 0.9, 0.6, 0.2)
    weights = {name: error_weights(name, energies, modules, sigmas) for name in ERROR_WEIGHTS}
    assert (weights["head"] == 1).all()
    heads = modules[0].heads
    by_module = weights["output"].reshape(4, -1, heads)
    added = energies["added"].reshape(4, -1, heads)
    np.testing.assert_allclose(by_module, heads * added / added.sum(axis=2, keepdims=True))
    left = energies["stream"] + np.repeat(added.sum(axis=2), heads, axis=1)
    share = energies["added"] / left
    np.testing.assert_allclose(weights["stream"], share / share.mean())
    by_step = np.array([0.1, 0.3, 0.4, 0.2])[:, None] ** 2 * share
    np.testing.assert_allclose(weights["stream-dt"], by_step / by_step.mean())
    gradient = energies["gradient"]
    by_step = weights["gradient"] / gradient
    np.testing.assert_allclose(by_step, np.broadcast_to(by_step[:, :1], by_step.shape))
    np.testing.assert_allclose(weights["gradient"].mean(axis=1), 1)


@pytest.mark.parametrize("name", WEIGHTED)
def test_heads_that_add_nothing_weigh_little_and_no_weight_is_infinite(name: str) -> None:
    energies, modules = _energies()
    for kind in ("added", "gradient"):
        energies[kind][1, : modules[0].heads] = 0
        energies[kind][2, 0] = 0
    weights = error_weights(name, energies, modules, (1.0, 0.9, 0.6, 0.2))
    assert (weights > 0).all() and np.isfinite(weights).all()
    assert weights[2, 0] < 1e-6
    silent = {kind: 0 * values for kind, values in energies.items()}
    assert np.isfinite(error_weights(name, silent, modules, (1.0, 0.9, 0.6, 0.2))).all()


def _weights_of(pipe: Any, prompts: Any, plan: Plan, name: str) -> np.ndarray:
    """Weights from a run in full of their own."""
    from plans.denoising import Denoising
    from plans.effort import Effort

    settings = Denoising(prompts, plan.steps, plan.height, plan.width, 4.0, None, 0)
    runs = Runs(pipe, settings, Effort(1, 2, False), {}, lambda *_: None, Scratch(None, {}, False))
    run = runs.run(dense_plan(plan), "weigh", 0, False, name)
    assert run.energies is not None
    return error_weights(name, run.energies, plan.modules, plan.sampler.sigmas)


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline])
@pytest.mark.parametrize("method", ["joint", "progressive"])
def test_both_methods_bound_weighted_errors(make: Any, method: str) -> None:
    pipe, prompts = make()
    plain = search(pipe, prompts, method=method)
    assert plain.search is not None and plain.search["metric"] == METRIC
    changed = 0
    for name in WEIGHTED:
        plan = search(pipe, prompts, method=method, error_weights=name)
        check_plan(plan)
        changed += plan.sha256 != plain.sha256
        record = plan.search
        assert record is not None and record["error_weights"] == name
        assert record["metric"] == METRIC + ERROR_WEIGHTS[name]
        weights, row = _weights_of(pipe, prompts, plan, name), 0
        measured = measure(pipe, plan, prompts)
        for module in plan.modules:
            own = weights[:, row : row + module.heads]
            row += module.heads
            errors = np.array([step[module.name] for step in measured]) * own
            assert errors.sum(axis=1).max() <= 0.3
            assert errors.max() <= 1.5 * 0.3 / module.heads
            told = record["errors"][module.name]
            np.testing.assert_allclose(told, errors.sum(axis=1), rtol=1e-4, atol=1e-9)
    assert changed


def test_head_is_what_is_searched_by_default() -> None:
    pipe, prompts = flux_pipeline()
    stages: list[str] = []
    plan = search(pipe, prompts, method="progressive", error_weights="head",
                  progress=lambda stage, *_: stages.append(stage))  # fmt: skip
    assert plan.sha256 == search(pipe, prompts, method="progressive").sha256
    assert "weigh" not in stages
    with pytest.raises(ArrowheadError, match="error weights .* got heads; expected one of head, o"):
        search(pipe, prompts, error_weights="heads")


def test_a_search_that_was_cut_off_keeps_its_weights(tmp_path: Any) -> None:
    pipe, prompts = flux_pipeline()
    whole = search(pipe, prompts, error_weights="stream")

    def cut(stage: str, done: int, total: int, saved: float) -> None:
        if stage == "measure 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(pipe, prompts, error_weights="stream", scratch=tmp_path, progress=cut)
    plan = search(pipe, prompts, error_weights="stream", scratch=tmp_path, resume=True)
    assert plan.search is not None and plan.search["resumed_runs"] == 1
    assert plan.sha256 == whole.sha256 and whole.search is not None
    assert plan.search["errors"] == whole.search["errors"]


def test_a_plan_is_measured_and_repaired_with_the_weights_of_its_record() -> None:
    pipe, prompts = flux_pipeline()
    plan = search(pipe, prompts, error_weights="stream")
    again = measure_plan(pipe, plan, prompts)
    assert plan.search is not None and again.search is not None
    assert again.search["error_weights"] == "stream" and again.search["within_bounds"]
    for name, errors in plan.search["errors"].items():
        assert again.search["errors"][name] == pytest.approx(errors, rel=1e-4, abs=1e-9)
    other = measure_plan(pipe, plan, prompts, error_weights="head").search
    assert other is not None and other["metric"] == METRIC and other["error_weights"] == "head"
    assert other["errors"] != again.search["errors"]
    tight = measure_plan(pipe, plan, prompts, repair=True, delta=0.02)
    assert tight.search is not None and tight.search["within_bounds"]
    assert np.mean(list(tight.search["errors"].values())) <= 0.02
    assert Bounds(0.02, 1.5, pooled=True).broken(plan.modules, measure(pipe, plan, prompts))


def test_carried_plans_keep_the_weights_for_their_repair() -> None:
    pipe, prompts = flux_pipeline()
    plan = search(pipe, prompts, error_weights="stream-dt", delta=1.0)
    assert any(CACHED in row for b in plan.buckets for row in b.modes.values())
    target = search(pipe, prompts, delta=0.0, steps=STEPS + 2)
    carried = carry_plan(plan, target).plan
    assert carried.search is not None and carried.search["error_weights"] == "stream-dt"
    repaired = measure_plan(pipe, carried, prompts, repair=True).search
    assert repaired is not None and repaired["error_weights"] == "stream-dt"
    assert repaired["within_bounds"] and repaired["delta"] == 1.0
