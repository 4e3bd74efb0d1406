"""The engine protocol: buffers checked once, lifecycle, and the PyTorch engine behind it."""

from __future__ import annotations

import pytest
import torch

from plans.bundle import TensorSpec
from plans.errors import ArrowheadError
from tests import tiny
from tests.trt_runtime.tiny_bundles import bundle_of, tiny_model
from trt_runtime.engine import allocate, check_buffers
from trt_runtime.parity import random_feeds
from trt_runtime.torch_engine import TorchEngine, position_ids

SPECS = (TensorSpec("x", "float32", ("B", 3)), TensorSpec("y", "float16", ("B", 2, 2)))
CPU = torch.device("cpu")


def test_allocate_fits_the_check() -> None:
    buffers = allocate(SPECS, 4)
    assert {name: tuple(t.shape) for name, t in buffers.items()} == {"x": (4, 3), "y": (4, 2, 2)}
    check_buffers("graph", SPECS, buffers, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 4)}, r"tensor x of graph .* \[4, 4\] .* \[4, 3\]"),
        ({"y": torch.zeros(4, 2, 2)}, "tensor y .* torch.float32 .* torch.float16"),
        ({"y": torch.zeros(3, 2, 2).half()}, r"tensor y .* \[3, 2, 2\] .* \[4, 2, 2\]"),
        ({"x": torch.zeros(3, 4).T}, "not contiguous"),
        ({"x": torch.zeros(4, 3, device="meta")}, "on meta; expected .* on cpu"),
        ({"z": torch.zeros(1)}, r"tensors of graph .* \['z'\] too many"),
    ],
)
def test_misfits_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ArrowheadError, match=message):
        check_buffers("graph", SPECS, allocate(SPECS, 4) | change, CPU)


def test_missing_buffer_is_named() -> None:
    with pytest.raises(ArrowheadError, match=r"\['y'\] missing"):
        check_buffers("graph", SPECS, {"x": torch.zeros(1, 3)}, CPU)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_torch_engine_runs_its_bucket_and_leaves_the_model_as_it_was(kind: str) -> None:
    model = tiny_model(kind)
    plan = tiny.random_plan(model)
    bundle = bundle_of(model, plan, 2)
    inputs = tiny.inputs_of(model)
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
    for graph in bundle.graphs:
        outputs = allocate(graph.outputs, 2)
        with TorchEngine(model, plan, graph) as engine:
            engine.run(random_feeds(plan, graph, 2), outputs)
        assert all(torch.isfinite(t).all() and t.abs().max() > 0 for t in outputs.values())
    with torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], before)


def test_torch_engine_lifecycle() -> None:
    model = tiny_model("sd3")
    plan = tiny.random_plan(model)
    graph = bundle_of(model, plan, 2).graphs[0]
    engine = TorchEngine(model, plan, graph)
    feeds, outputs = random_feeds(plan, graph, 2), allocate(graph.outputs, 2)
    with pytest.raises(ArrowheadError, match="bucket 0 .* outside its `with` block"):
        engine.run(feeds, outputs)
    with engine:
        with pytest.raises(ArrowheadError, match="second activation"):
            engine.__enter__()
        engine.run(feeds, outputs)


def test_torch_engine_refuses_another_transformer() -> None:
    model = tiny_model("sd3")
    plan = tiny.random_plan(model)
    graph = bundle_of(model, plan, 2).graphs[0]
    other = tiny.tiny_sd3(num_layers=2, dual_attention_layers=())
    with pytest.raises(ArrowheadError, match="attention modules"), TorchEngine(other, plan, graph):
        pass


def test_position_ids_are_those_of_the_pipeline() -> None:
    from diffusers import FluxPipeline

    plan = tiny.random_plan(tiny_model("flux"))
    rows, columns = tiny.HEIGHT // 16, tiny.WIDTH // 16
    expected = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
    assert torch.equal(position_ids(plan)["img_ids"], expected)
    assert position_ids(tiny.random_plan(tiny_model("sd3"))) == {}
