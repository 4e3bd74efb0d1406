from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import external_data_helper
from torch import Tensor

from exporter import export, export_bundle
from exporter.weights import WeightsFile
from plans.bundle import Bundle, GraphSpec, check_bundle, file_sha256, load_bundle
from plans.errors import ArrowheadError
from plans.plan import Plan, cache_flow, dense_plan, load_plan
from plans.processors import BucketHeads, install
from tests.exporter.conftest import BATCH, Exported
from tests.tiny import inputs_of, random_plan, tiny_sd3


def open_graph(folder: Path, graph: GraphSpec) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(
        str(folder / graph.file), options, providers=["CPUExecutionProvider"]
    )


def graph_feeds(graph: GraphSpec, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    names = {spec.name for spec in graph.inputs}
    return {name: x.numpy() for name, x in inputs.items() if name in names}


@torch.no_grad()
def torch_step(model: Any, plan: Plan, heads: BucketHeads, inputs: dict[str, Tensor]) -> Tensor:
    undo = install(model, plan.modules, heads)
    try:
        return model(**inputs, return_dict=False)[0]
    finally:
        undo()


def test_a_run_equals_torch_caches_included(exported: Exported) -> None:
    plan, bundle = exported.plan, exported.bundle
    sessions = [open_graph(exported.folder, graph) for graph in bundle.graphs]
    buckets = [BucketHeads(plan, bucket) for bucket in range(len(plan.buckets))]
    caches: dict[str, Tensor] = {}
    got_caches: dict[str, np.ndarray] = {}
    for step, bucket in enumerate(plan.schedule):
        inputs = inputs_of(exported.model, seed=step, batch=BATCH)
        buckets[bucket].cache_in = caches
        want = torch_step(exported.model, plan, buckets[bucket], inputs)
        caches = {**caches, **buckets[bucket].cache_out}

        graph = bundle.graph(bucket)
        feeds = graph_feeds(graph, inputs)
        reads = {x.name for x in graph.inputs if x.name.startswith("cache_in.")}
        feeds |= {name: got_caches[name.removeprefix("cache_in.")] for name in reads}
        names = [spec.name for spec in graph.outputs]
        got = dict(zip(names, sessions[bucket].run(names, feeds), strict=True))
        np.testing.assert_allclose(got.pop("sample"), want.numpy(), rtol=0, atol=1e-4)
        for name, value in got.items():
            name = name.removeprefix("cache_out.")
            got_caches[name] = value
            np.testing.assert_allclose(value, caches[name].numpy(), rtol=0, atol=1e-4)


def test_dense_equals_the_unpatched_model(exported: Exported) -> None:
    inputs = inputs_of(exported.model, batch=BATCH)
    with torch.no_grad():
        want = exported.model(**inputs, return_dict=False)[0]
    dense = exported.bundle.dense
    assert dense is not None
    session = open_graph(exported.folder, dense)
    (got,) = session.run(["sample"], graph_feeds(dense, inputs))
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4)
    model = onnx.load(exported.folder / dense.file, load_external_data=False)
    assert not model.functions and {x.domain for x in model.graph.node} == {""}


def test_graph_io_is_what_the_plan_says(exported: Exported) -> None:
    flow = cache_flow(exported.plan)
    shapes = {name: shape for name, _, shape in exported.bundle.cache_groups}
    for graph in exported.bundle.graphs:
        assert graph.bucket is not None
        session = open_graph(exported.folder, graph)
        for specs, values in (
            (graph.inputs, session.get_inputs()),
            (graph.outputs, session.get_outputs()),
        ):
            assert [(x.name, list(x.shape)) for x in specs] == [(v.name, v.shape) for v in values]
        ins = {x.name: x.shape for x in graph.inputs if x.name.startswith("cache")}
        outs = {x.name: x.shape for x in graph.outputs if x.name.startswith("cache")}
        assert ins == {f"cache_in.{g.name}": shapes[g.name] for g in flow.reads(graph.bucket)}
        assert outs == {f"cache_out.{g.name}": shapes[g.name] for g in flow.writes(graph.bucket)}


def test_every_weight_is_stored_once_as_the_checkpoint_has_it(exported: Exported) -> None:
    bundle, folder = exported.bundle, exported.folder
    data = (folder / bundle.weights_file).read_bytes()
    parameters = dict(exported.model.named_parameters())
    where: dict[str, int] = {}
    for graph in bundle.all_graphs:
        for weight in graph.weights:
            name, _, rows = weight.name.removeprefix("transformer.").partition(".rows_")
            assert weight.offset % (4 if rows else 4096) == 0
            if name not in parameters:
                continue
            want = parameters[name].detach()
            if rows:
                first, last = map(int, rows.split("_"))
                want = want[first:last]
            assert tuple(want.shape) == weight.shape
            assert data[weight.offset :][: weight.nbytes] == want.numpy().tobytes()
            if not rows:
                assert where.setdefault(name, weight.offset) == weight.offset
    stored = sum(math.ceil(x.nbytes / 4096) * 4096 for x in parameters.values() if x.nbytes >= 1024)
    # Beside the parameters: position tables and the like, a few pages.
    assert len(data) <= stored + 8 * 4096
    assert any(".rows_" in w.name for graph in bundle.graphs for w in graph.weights)


def test_no_tensor_data_and_no_machine_paths_in_the_graphs(exported: Exported) -> None:
    for graph in exported.bundle.all_graphs:
        raw = (exported.folder / graph.file).read_bytes()
        assert b"site-packages" not in raw and str(Path.cwd()).encode() not in raw
        model = onnx.load(exported.folder / graph.file, load_external_data=False)
        inside = [
            math.prod(x.dims)
            for x in model.graph.initializer
            if not external_data_helper.uses_external_data(x)
        ]
        assert max(inside) <= 256


def test_bundle_on_disk(exported: Exported) -> None:
    bundle, folder = load_bundle(exported.folder), exported.folder
    assert bundle == exported.bundle
    plan = load_plan(folder / bundle.plan_file)
    check_bundle(bundle, folder, plan, hash_weights=True)
    assert bundle.weights_sha256 == file_sha256(folder / bundle.weights_file)
    assert set(bundle.versions) == {"torch", "onnx", "onnxscript", "diffusers", "arrowhead"}
    assert {x.name for x in folder.parent.iterdir()} == {folder.name}


def test_the_model_is_left_alone(exported: Exported) -> None:
    model = exported.model
    assert {n: id(m) for n, m in model.named_modules()} == exported.before
    kinds = {type(m.processor).__name__ for m in model.modules() if hasattr(m, "processor")}
    assert not any("Headwise" in kind for kind in kinds)
    assert "cropped_pos_embed" not in vars(model.pos_embed)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    model = tiny_sd3(num_layers=1)
    plan = dense_plan(random_plan(model))
    bundle = export_bundle(model, plan, tmp_path / "b", dtype=dtype, batch=BATCH, dense=False)
    assert next(model.parameters()).dtype == torch.float32
    assert {x.dtype for x in bundle.graphs[0].weights} <= {bundle.dtype, "float32"}
    assert bundle.dense is None
    if dtype == "bf16":
        return  # ONNX Runtime's CPU provider has no bf16 multiply; the checker has seen the graph
    session = open_graph(tmp_path / "b", bundle.graphs[0])
    half = model.half()
    inputs = inputs_of(half, batch=BATCH)
    (got,) = session.run(["sample"], graph_feeds(bundle.graphs[0], inputs))
    want = torch_step(half, plan, BucketHeads(plan, 0), inputs)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=2e-2)


def small() -> tuple[Any, Plan]:
    model = tiny_sd3(num_layers=1, dual_attention_layers=())
    return model, dense_plan(random_plan(model))


def quick_export(monkeypatch: Any, model: Any, plan: Plan, folder: Path, **options: Any) -> Bundle:
    """Everything but the tracing, which takes seconds."""
    monkeypatch.setattr(export, "_write_graphs", lambda *_: ([], "0" * 64))
    return export_bundle(model, plan, folder, **{"dtype": "fp32", "batch": 2, **options})


def test_refusals(tmp_path: Path) -> None:
    model, plan = small()
    arguments: dict[str, Any] = {"dtype": "fp32", "batch": 2}
    with pytest.raises(ArrowheadError, match="dtype | got int8; expected one of float32, float16"):
        export_bundle(model, plan, tmp_path / "b", dtype="int8", batch=2)
    with pytest.raises(ArrowheadError, match=r"buckets to export \| got 9; expected some of \[0"):
        export_bundle(model, plan, tmp_path / "b", buckets=[0, 9], **arguments)
    with pytest.raises(ArrowheadError, match=r"batch \| got 0"):
        export_bundle(model, plan, tmp_path / "b", dtype="fp32", batch=0)
    with pytest.raises(ArrowheadError, match="got Linear; expected one of SD3Transformer2DModel"):
        export_bundle(torch.nn.Linear(1, 1), plan, tmp_path / "b", **arguments)
    other = tiny_sd3(num_layers=2, dual_attention_layers=())
    with pytest.raises(ArrowheadError, match="transformer config"):
        export_bundle(other, plan, tmp_path / "b", **arguments)
    model.fuse_qkv_projections()
    with pytest.raises(ArrowheadError, match="fused QKV projections"):
        export_bundle(model, plan, tmp_path / "b", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_bundle_is_kept(tmp_path: Path) -> None:
    model, plan = small()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArrowheadError, match="got something that is not a bundle"):
        export_bundle(model, plan, tmp_path, dtype="fp32", batch=2)
    assert (tmp_path / "thesis.txt").exists()


def test_an_old_bundle_is_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    model, plan = small()
    quick_export(monkeypatch, model, plan, tmp_path / "b")
    (tmp_path / "b" / "stale.onnx").write_bytes(b"")
    quick_export(monkeypatch, model, plan, tmp_path / "b")
    assert not (tmp_path / "b" / "stale.onnx").exists()
    assert [x.name for x in tmp_path.iterdir()] == ["b"]


def test_source_is_kept_relative(tmp_path: Path, monkeypatch: Any) -> None:
    model, plan = small()
    model.save_pretrained(tmp_path / "models" / "tiny" / "transformer")
    source = str(tmp_path / "models" / "tiny")
    bundle = quick_export(monkeypatch, model, plan, tmp_path / "out" / "b", source=source)
    assert bundle.model["source"] == "../../models/tiny"
    assert len(bundle.model["weights_sha256"]) == 64
    assert load_plan(tmp_path / "out" / "b" / "plan.json").model.source == "../../models/tiny"
    hub = quick_export(monkeypatch, model, plan, tmp_path / "c", source="someone/tiny")
    assert hub.model["source"] == "someone/tiny"


def test_too_little_space_is_seen_before_the_work(tmp_path: Path, monkeypatch: Any) -> None:
    model, plan = small()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ArrowheadError, match="got 0.0 GiB free; .*nothing was left behind"):
        export_bundle(model, plan, tmp_path / "b", dtype="fp32", batch=2)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    model, plan = small()

    def full(self: WeightsFile, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WeightsFile, "_append", full)
    monkeypatch.setattr(export, "bucket_graph", lambda *_: one_weight_graph(model))
    with pytest.raises(ArrowheadError, match="No space left on device; expected room"):
        export_bundle(model, plan, tmp_path / "b", dtype="fp32", batch=2)
    assert not list(tmp_path.iterdir())


def one_weight_graph(model: Any) -> Any:
    import onnx_ir as ir

    tensor = ir.tensor_adapters.TorchTensor(model.proj_out.weight.detach().repeat(9, 1), name="w")
    value = ir.Value(
        name="w", shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def test_schedule_of_another_plan_needs_another_export(exported: Exported) -> None:
    plan = replace(exported.plan, schedule=(0, *reversed(exported.plan.schedule[1:])))
    with pytest.raises(ArrowheadError, match="edited after the export"):
        check_bundle(exported.bundle, exported.folder, plan)


def test_graphs_hold_no_operator_without_bf16(exported: Exported) -> None:
    """Conv and Einsum have none in the opset: a bf16 graph with one does not load."""
    for graph in exported.bundle.all_graphs:
        nodes = onnx.load(exported.folder / graph.file, load_external_data=False).graph.node
        assert not {node.op_type for node in nodes if not node.domain} & {"Conv", "Einsum"}
