"""The tile arithmetic as a library of its own: C++ without CUDA, compiled in a second."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from plugins.torch.library import TokenLayout

PLUGINS = Path(__file__).parents[2] / "plugins"
NO_LIBRARY = "no libarrowhead.so: run `make plugins`" + (
    "" if shutil.which("nvcc") else ", which needs nvcc, and there is none on PATH"
)


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile and load plugins/c_api_tiles.cpp, which the kernel library contains too."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: the kernel's tile arithmetic is not tested")
    path = tmp_path_factory.mktemp("tiles") / "libtiles.so"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
         "-I", str(PLUGINS), str(PLUGINS / "c_api_tiles.cpp"), "-o", str(path)],
        check=True,
    )  # fmt: skip
    library = ctypes.CDLL(str(path))
    library.arrowhead_kept_pairs.argtypes = [TokenLayout, ctypes.c_int, ctypes.c_int]
    library.arrowhead_kept_pairs.restype = ctypes.c_longlong
    return library
