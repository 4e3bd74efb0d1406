"""The built kernel library, as far as a machine without a GPU can tell."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from plans.errors import ArrowheadError
from plugins.torch import library
from plugins.torch.library import AttentionParams, TensorView
from tests.plugins.conftest import NO_LIBRARY

INVALID_VALUE, NO_DEVICE_ERRORS, MISALIGNED = 1, {35, 100}, 716
built = pytest.mark.skipif(library.find_library() is None, reason=NO_LIBRARY)


def valid_params() -> AttentionParams:
    """One full head over 64 image tokens; the addresses are never followed here."""
    params = AttentionParams()
    params.struct_size = ctypes.sizeof(AttentionParams)
    params.batch = params.heads = params.qkv_heads = 1
    params.head_dim, params.image_tokens, params.block, params.scale = 64, 64, 128, 0.125
    for name in ("q", "k", "v", "out"):
        getattr(params, name).image = TensorView(4096, 64 * 64, 64, 64)
    params.tasks[0].mode, params.tasks[0].second = -1, -1
    params.workspace = 4096
    return params


def launch(params: AttentionParams) -> int:
    return library.load_library().arrowhead_attention(ctypes.byref(params), None)


@built
@pytest.mark.parametrize(
    ("field", "value"),
    [("struct_size", 8), ("batch", 0), ("heads", 129), ("head_dim", 96), ("element", 2),
     ("image_tokens", -1), ("image_tokens", 0), ("block", 0), ("scale", 0.0),
     ("scale", float("nan")), ("workspace", None), ("text_tokens", 5)],
)  # fmt: skip
def test_contradictions_are_refused(field: str, value: object) -> None:
    params = valid_params()
    setattr(params, field, value)
    assert launch(params) == INVALID_VALUE


@built
@pytest.mark.parametrize("task", [(-3, 0, -1), (-1, 1, -1), (-1, -1, -1), (-2, 0, -1), (-1, 0, 0)])
def test_tasks_must_name_heads_that_exist(task: tuple[int, int, int]) -> None:
    params = valid_params()
    params.tasks[0].mode, params.tasks[0].source, params.tasks[0].second = task
    assert launch(params) == INVALID_VALUE


@built
@pytest.mark.parametrize("view", [(4098, 4096, 64, 64), (4096, 4096, 65, 64), (4096, 4, 64, 64)])
def test_rows_the_copy_engine_cannot_load_are_refused(view: tuple[int, int, int, int]) -> None:
    params = valid_params()
    params.k.image = TensorView(*view)
    assert launch(params) == MISALIGNED


@built
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_without_a_gpu_the_launch_says_so() -> None:
    error = launch(valid_params())
    assert error in NO_DEVICE_ERRORS
    assert library.load_library().arrowhead_error_string(error)


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to list symbols")
def test_the_library_exports_its_own_names_only() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(library.find_library())],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert names and all(name.startswith("arrowhead_") for name in names)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no file at"), (b"not ELF", "another kind of file")]
)
def test_a_library_that_cannot_be_loaded_is_named(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "libarrowhead.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(library.VARIABLE, str(path))
    library.load_library.cache_clear()
    with pytest.raises(ArrowheadError, match=f"{message}.*make plugins"):
        library.load_library()
    library.load_library.cache_clear()
