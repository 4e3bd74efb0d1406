"""Where the kernel library computes attention, and where something else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plans.errors import ArrowheadError
from plugins.torch import attention, library
from trt_runtime.kernels import use_kernels


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Stand for an H200 and a built library; hold a word for each registration."""
    calls: list[str] = []
    path = tmp_path / "libarrowhead.so"
    path.touch()
    monkeypatch.setenv(library.VARIABLE, str(path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "register", lambda: calls.append("registered"))
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_cuda_takes_the_kernels(
    dtype: torch.dtype, registered: list[str]
) -> None:
    assert use_kernels("cuda:0", dtype) == "kernel library"
    assert registered


def test_others_do_without(registered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_kernels("cpu", torch.float16) == "reference"
    assert use_kernels("cuda", torch.float32) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert use_kernels("cuda", torch.float16) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delenv(library.VARIABLE)
    monkeypatch.setattr(library, "BUILT", Path("absent.so"))
    assert use_kernels("cuda", torch.float16) == "sdpa"
    assert not registered


def test_a_library_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "absent.so")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    library.load_library.cache_clear()
    with pytest.raises(ArrowheadError, match="no file at absent.so"):
        use_kernels("cuda", torch.bfloat16)
