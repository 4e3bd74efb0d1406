"""Which operators the graphs hold, and how caches are taken from them."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest

from exporter.functions import ATTENTION
from tests.exporter.conftest import Exported


def test_operators_are_those_of_the_design(exported: Exported) -> None:
    plan = exported.plan
    for graph in exported.bundle.graphs:
        assert graph.bucket is not None
        model = onnx.load(exported.folder / graph.file, load_external_data=False)
        rows = {"HeadNorm", "HeadRotary"}
        assert {f.name for f in model.functions} == {*ATTENTION, *rows}
        assert {x.domain: x.version for x in model.opset_import}["arrowhead"] == 1
        nodes = {x.name: x for x in model.graph.node if x.op_type in ATTENTION}
        modes = plan.buckets[graph.bucket].modes
        assert list(nodes) == [m.name for m in plan.modules if set(modes[m.name]) != {-2}]
        for module in plan.modules:
            if module.name not in nodes:
                continue
            node, row = nodes[module.name], modes[module.name]
            values = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
            assert node.op_type == ("CachedHead" if -2 in row else "ArrowAttention")
            assert values["half_windows"] == [mode for mode in row if mode != -2]
            assert values["text_first"] == int(module.layout.text_first)
            assert values["text_tokens"] == module.layout.text_tokens
            assert values["block"] == module.layout.block
            assert values["scale"] == pytest.approx(module.head_dim**-0.5)
            assert ("source" in values) == (-2 in row)


def test_heads_are_normed_and_turned_by_an_operator_each(exported: Exported) -> None:
    """In standard operators they are a dozen passes over every token, which few runtimes fuse."""
    plan, flux = exported.plan, "Flux" in type(exported.model).__name__
    for graph in exported.bundle.graphs:
        model = onnx.load(exported.folder / graph.file, load_external_data=False)
        kinds = Counter(node.op_type for node in model.graph.node)
        assert graph.bucket is not None
        modes = plan.buckets[graph.bucket].modes
        live = [module.name for module in plan.modules if set(modes[module.name]) != {-2}]
        # Those with text of its own projections have norms of its own; SD3.5's attn2 has no text.
        joint = [name for name in live if not name.startswith("single") and "attn2" not in name]
        assert kinds["HeadRotary"] == (2 * len(live) if flux else 0)
        assert kinds["HeadNorm"] == 2 * (len(live) + len(joint))
        assert not {"Pow", "Reciprocal", "Neg"} & set(kinds)


def test_merged_heads_are_named_after_their_module(exported: Exported) -> None:
    model = onnx.load(exported.folder / exported.bundle.graph(0).file, load_external_data=False)
    outputs = {x.output[0] for x in model.graph.node if x.op_type in ATTENTION}
    assert outputs == {f"merged.{module.name}" for module in exported.plan.modules}


def test_caches_are_slices_of_the_merged_heads(exported: Exported) -> None:
    """TensorRT-RTX runs a Gather last, and holds what it reads until then."""
    kinds = set()
    for graph in exported.bundle.graphs:
        model = onnx.load(exported.folder / graph.file, load_external_data=False)
        made_by = {name: node for node in model.graph.node for name in node.output}
        for spec in graph.outputs:
            if spec.name.startswith("cache_out."):
                last = made_by[spec.name]
                parts = [made_by[x] for x in last.input] if last.op_type == "Concat" else [last]
                kinds |= {last.op_type, *(part.op_type for part in parts)}
                assert all(made_by[part.input[0]].op_type in ATTENTION for part in parts)
    assert kinds == {"Concat", "Slice", "Identity"}  # several runs of heads, a run, all heads
