"""Bundle folders with engine files as the stand-in for TensorRT takes them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plans.bundle import BatchRange, Bundle, GraphSpec, TensorSpec, WeightSpec, file_sha256
from tests.trt_runtime import fake_tensorrt as fake
from trt_runtime.device_weights import DeviceWeights
from trt_runtime.engine import DTYPES, shape_of
from trt_runtime.tensorrt_engine import ActivationMemory, TensorRTEngine
from trt_runtime.tensorrt_library import PluginLibrary
from trt_runtime.tensorrt_metadata import EngineMetadata, engine_path, save_metadata

MATRIX = WeightSpec("to_q.weight", 0, 512, "float16", (16, 16))
ROWS = WeightSpec("to_q.weight.rows_8_16", 256, 256, "float16", (8, 16))
BIAS = WeightSpec("to_q.bias", 512, 32, "float16", (16,))
PLUGIN = PluginLibrary(Path("libarrowhead_trt.so"), "0.1.0", "0123456789abcdef")


def graph_of(name: str = "bucket_0", batch: int | str = 2) -> GraphSpec:
    return GraphSpec(
        f"{name}.onnx",
        int(name[-1]),
        (
            TensorSpec("hidden_states", "float16", (batch, 4, 8)),
            TensorSpec("cache_in.a.0", "float16", (batch, 6, 1, 8)),
        ),
        (TensorSpec("sample", "float16", (batch, 4, 8)),),
        (MATRIX, ROWS, BIAS),
    )


class Built:
    """A bundle folder with engine files as the stand-in takes them."""

    def __init__(self, folder: Path, *graphs: GraphSpec, batches: BatchRange | None = None) -> None:
        self.folder = folder
        (folder / "weights.bin").write_bytes(bytes(range(256)) * 2 + bytes(32))
        for graph in graphs:
            (folder / graph.file).write_text(graph.file)
        self.bundle = Bundle(
            plan_sha256="a" * 64,
            model={"architecture": "SD3Transformer2DModel"},
            config={},
            dtype="float16",
            batch=2 if batches is None else batches.max,
            batch_range=batches,
            weights_file="weights.bin",
            weights_sha256=file_sha256(folder / "weights.bin"),
            cache_groups=(),
            graphs=graphs,
            dense=None,
            versions={},
        )
        self.weights = DeviceWeights(folder / "weights.bin", "cpu")
        self.memory = ActivationMemory("cpu")

    def write(self, graph: GraphSpec, activation_bytes: int = 1000, **changes: Any) -> Path:
        content = fake.engine_content(graph, (MATRIX, ROWS), activation_bytes)
        path = engine_path(self.folder, graph)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        metadata = EngineMetadata(
            engine_bytes=len(content),
            engine_sha256=hashlib.sha256(content).hexdigest(),
            bucket=graph.bucket,
            steps=[[0, 1]],
            graph_sha256=file_sha256(self.folder / graph.file),
            weights_sha256=self.bundle.weights_sha256,
            plan_sha256=self.bundle.plan_sha256,
            architecture="SD3Transformer2DModel",
            picture=[64, 96],
            scheduler="FlowMatchEulerDiscreteScheduler",
            num_steps=4,
            dtype="float16",
            batch=[2, 2, 2],
            arrowhead="0.1.0",
            tensorrt={"flavour": "TensorRT", "version": "11.4.0", "bindings": "11.4.0.106"},
            plugin=PLUGIN.identity,
            operators={"transformer_blocks.0.attn": "plugin"},
            compute_capability="9.0",
            device="NVIDIA H200",
            cuda="13.0",
            driver="580.0",
            weights="shared",
            shared_weights=[MATRIX.name, ROWS.name],
            inputs=[],
            outputs=[],
            caches=[],
            weights_bytes=32,
            activation_bytes=None,
            builder={"optimization_level": 3, "flags": [], "timing_cache_sha256": None},
            built="2026-01-01T00:00:00+00:00",
            seconds=1.0,
        )
        save_metadata(replace(metadata, **changes), path)
        return path

    def engine(self, graph: GraphSpec) -> TensorRTEngine:
        return TensorRTEngine(self.folder, self.bundle, graph, self.weights, self.memory, "cpu")


def buffer_of(spec: TensorSpec, batch: int = 2) -> Tensor:
    """Zeros at a multiple of 256 bytes, as on a GPU."""
    shape, dtype = shape_of(spec, batch), DTYPES[spec.dtype]
    size = torch.Size(shape).numel()
    room = torch.zeros(size + 256, dtype=dtype)
    start = (-room.data_ptr() % 256) // room.element_size()
    return room[start : start + size].view(shape)


def buffers_of(graph: GraphSpec, batch: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    feeds = {spec.name: buffer_of(spec, batch) for spec in graph.inputs}
    return feeds, {spec.name: buffer_of(spec, batch) for spec in graph.outputs}
