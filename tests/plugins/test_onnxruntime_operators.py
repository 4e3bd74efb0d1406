"""The operator library inside ONNX Runtime: the reference's results, from its own kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from plans import reference
from tests import operator_library
from tests.exporter.test_functions import one_op_model

Tensors = dict[str, Tensor]
Attributes = dict[str, Any]


@pytest.fixture(scope="module")
def library() -> Path:
    return operator_library.built()


def session(
    library: Path, tensors: Tensors, attributes: Attributes, threads: int = 1,
    symbolic: bool = False, save: str = "",
) -> ort.InferenceSession:  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.optimized_model_filepath = save
    options.register_custom_ops_library(str(library))
    model = one_op_model(tensors, attributes, symbolic).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(library: Path, tensors: Tensors, attributes: Attributes, **options: Any) -> Tensor:
    """Run into an output full of NaN: what is not written is seen."""
    made = session(library, tensors, attributes, **options)
    heads = len(attributes.get("source", attributes["half_windows"]))
    shape = [*tensors["q"].shape[:2], heads, tensors["q"].shape[3]]
    out = torch.full(shape, torch.nan, dtype=tensors["q"].dtype)
    binding = made.io_binding()
    for name, tensor in tensors.items():
        binding.bind_cpu_input(name, tensor.numpy())
    element = np.float32 if out.dtype == torch.float32 else np.float16
    binding.bind_output("o", "cpu", 0, element, shape, out.data_ptr())
    made.run_with_iobinding(binding)
    return out


def expected(tensors: Tensors, attributes: Attributes) -> Tensor:
    named = {**attributes, "text_first": bool(attributes["text_first"])}
    function = reference.cached_head if "cache" in tensors else reference.arrow_attention
    return function(**tensors, **named)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


@st.composite
def cases(draw: Any) -> tuple[Tensors, Attributes]:
    image = draw(st.sampled_from([0, 1, 5, 31, 32, 33, 50, 128, 200, 500]))
    text = draw(st.sampled_from([0, 1, 9, 33, 97]).filter(lambda text: image + text > 0))
    windows = draw(st.lists(st.sampled_from([-1, -1, 0, 1, 2, 5, 1000]), min_size=1, max_size=5))
    head_dim = draw(st.sampled_from([1, 20, 64, 128]))
    attributes = {
        "scale": 1.5 * head_dim**-0.5,
        "text_tokens": text,
        "text_first": draw(st.integers(0, 1)),
        "block": draw(st.sampled_from([1, 3, 16, 128, 2**40])),
        "half_windows": windows,
    }
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16]))
    torch.manual_seed(draw(st.integers(0, 99)))
    shape = (draw(st.integers(1, 2)), image + text, len(windows), head_dim)
    tensors = {name: normal(*shape, dtype=dtype) for name in "qkv"}
    cached = draw(st.integers(0, 3))
    if cached:
        tensors["cache"] = normal(*shape[:2], cached, head_dim, dtype=dtype)
        heads = st.integers(0, len(windows) + cached - 1)
        attributes["source"] = draw(st.lists(heads, min_size=1, max_size=6))
    return tensors, attributes


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases(), threads=st.integers(1, 3), symbolic=st.booleans())
def test_kernels_equal_the_reference(
    library: Path, case: tuple[Tensors, Attributes], threads: int, symbolic: bool
) -> None:
    tensors, attributes = case
    got = run(library, tensors, attributes, threads=threads, symbolic=symbolic)
    # fp16: one rounding of values below 8.
    tolerance = 1e-5 if got.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got, expected(tensors, attributes), rtol=0, atol=tolerance)


def attributes_of(**changes: Any) -> Attributes:
    layout = dict(scale=0.125, text_tokens=20, text_first=1, block=16, half_windows=[-1, 0, 2])
    return {**layout, **changes}


def tensors_of(heads: int = 3, tokens: int = 148, cached: int = 0) -> Tensors:
    torch.manual_seed(0)
    tensors = {name: normal(2, tokens, heads, 64) for name in "qkv"}
    return tensors | ({"cache": normal(2, tokens, cached, 64)} if cached else {})


@pytest.mark.parametrize("cached", [0, 2])
def test_the_kernel_is_taken_and_the_function_body_is_not(
    library: Path, cached: int, tmp_path: Path
) -> None:
    tensors = tensors_of(cached=cached)
    attributes = attributes_of(**({"source": [3, 0, 1, 2, 4]} if cached else {}))
    path = tmp_path / "optimised.onnx"
    made = session(library, tensors, attributes, save=str(path))
    name = "CachedHead" if cached else "ArrowAttention"
    assert [node.op_type for node in onnx.load(path).graph.node] == [name]
    assert made.get_outputs()[0].shape == [2, 148, 5 if cached else 3, 64]


def test_threads_do_not_change_a_bit(library: Path) -> None:
    tensors, attributes = tensors_of(), attributes_of()
    one, *others = (run(library, tensors, attributes, threads=n) for n in (1, 2, 3, 8))
    assert all(torch.equal(one, other) for other in others)


def test_large_scores_do_not_overflow(library: Path) -> None:
    tensors, attributes = tensors_of(), attributes_of(scale=40.0)
    got = run(library, tensors, attributes)
    assert (tensors["q"] @ tensors["k"].transpose(-1, -2) * 40.0).abs().max() > 1000
    torch.testing.assert_close(got, expected(tensors, attributes), rtol=0, atol=1e-3)


def test_keys_far_outside_the_band_are_not_read(library: Path) -> None:
    """A NaN among the keys reaches the text rows and the strips of its own band, no others."""
    tensors, attributes = tensors_of(heads=1), attributes_of(half_windows=[1])
    for name in "kv":
        tensors[name][:, 20 + 64] = torch.nan  # block 4 of 8
    got = run(library, tensors, attributes)
    lost = got.isnan().any(dim=3)[0, :, 0]
    assert lost[:20].all() and lost[20 + 48 : 20 + 96].all()
    assert not lost[20 : 20 + 32].any() and not lost[20 + 96 :].any()


@pytest.mark.parametrize(
    ("tensors", "attributes", "message"),
    [
        (tensors_of(heads=2), {}, r"q of shape \[2, 148, 2, 64\] with 3 half windows"),
        (tensors_of(tokens=12), {}, "got 12 tokens; expected 20 of text"),
        (tensors_of() | {"k": torch.zeros(2, 148, 3, 32)}, {}, "expected one shape"),
        (tensors_of(cached=1), {"source": [4]}, "got source 4; expected 0 to 3"),
        (tensors_of(cached=1) | {"cache": torch.zeros(2, 9, 1, 64)}, {"source": [3]},
         r"cache of shape \[2, 9, 1, 64\]; expected the same but for the heads"),
        (tensors_of(), {"half_windows": [-1, -2, 0]}, "got half window -2"),
        (tensors_of(), {"block": 0}, "block 0; expected .* block >= 1"),
        (tensors_of(heads=129), {"half_windows": [0] * 129}, "got 129 output heads"),
    ],
)  # fmt: skip
def test_contradictions_are_named(
    library: Path, tensors: Tensors, attributes: Attributes, message: str
) -> None:
    feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
    with pytest.raises(Exception, match=f"Arrowhead: .*{message}"):
        session(library, tensors, attributes_of(**attributes), symbolic=True).run(None, feeds)
