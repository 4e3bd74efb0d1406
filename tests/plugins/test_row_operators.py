"""HeadNorm and HeadRotary inside ONNX Runtime on a CPU: as PyTorch, from their own kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from plans.ops import rotary_embedding
from tests import operator_library
from tests.exporter.test_functions import one_op_model

EPSILON = 1e-3
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def library() -> Path:
    return operator_library.built()


def session(
    library: Path, name: str, tensors: Tensors, threads: int = 1, save: str = ""
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.optimized_model_filepath = save
    options.register_custom_ops_library(str(library))
    attributes: dict[str, Any] = {"epsilon": EPSILON} if name == "HeadNorm" else {}
    model = one_op_model(tensors, attributes, False, name).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(library: Path, name: str, tensors: Tensors, threads: int = 1) -> Tensor:
    """Run into an output full of NaN: what is not written is seen."""
    made = session(library, name, tensors, threads)
    x = tensors["x"]
    out = torch.full_like(x, torch.nan)
    binding = made.io_binding()
    for key, tensor in tensors.items():
        binding.bind_cpu_input(key, tensor.numpy())
    element = np.float32 if x.dtype == torch.float32 else np.float16
    binding.bind_output("o", "cpu", 0, element, list(x.shape), out.data_ptr())
    made.run_with_iobinding(binding)
    return out


def tensors_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    x = (3 * torch.randn(shape)).to(dtype)
    if name == "HeadNorm":
        return {"x": x, "weight": torch.randn(shape[3]).to(dtype)}
    angles = 9 * torch.randn(shape[1], shape[3])
    return {"x": x, "cos": angles.cos(), "sin": angles.sin()}


def expected(name: str, tensors: Tensors) -> Tensor:
    if name == "HeadNorm":
        weight = tensors["weight"]
        return F.rms_norm(tensors["x"], weight.shape, weight, EPSILON)
    return rotary_embedding(**tensors)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["HeadNorm", "HeadRotary"]),
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 40), st.integers(1, 5),
        st.sampled_from([2, 8, 20, 64, 128]),
    ),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_kernels_equal_pytorch(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, threads: int, seed: int, library: Path
) -> None:
    torch.manual_seed(seed)
    tensors = tensors_of(name, shape, dtype)
    got, want = run(library, name, tensors, threads), expected(name, tensors)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["HeadNorm", "HeadRotary"])
def test_the_kernel_is_taken_and_the_function_body_is_not(
    name: str, library: Path, tmp_path: Path
) -> None:
    path = tmp_path / "optimised.onnx"
    session(library, name, tensors_of(name, (2, 5, 3, 8), torch.float32), save=str(path))
    assert [node.op_type for node in onnx.load(path).graph.node] == [name]


@pytest.mark.parametrize(
    ("name", "other"), [("HeadNorm", {"weight": (9,)}), ("HeadRotary", {"sin": (4, 8)})]
)
def test_contradictions_are_named(
    name: str, other: dict[str, tuple[int, ...]], library: Path
) -> None:
    tensors = tensors_of(name, (2, 5, 3, 8), torch.float32)
    tensors |= {key: torch.randn(shape) for key, shape in other.items()}
    with pytest.raises(Exception, match="a weight or table does not fit the heads it is for"):
        run(library, name, tensors)
