"""The operators' own kernels for ONNX Runtime: found, and taken in place of the function bodies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from plans.bundle import GraphSpec
from plans.errors import ArrowheadError

VARIABLE = "ARROWHEAD_ORT_LIBRARY"
_NAME = "libarrowhead_onnxruntime.so"
_BUILD = Path(__file__).parents[1] / "build"
BUILT = (_BUILD / "plugins" / _NAME, _BUILD / "plugins-cpu" / _NAME)

# The CUDA kernels have no fp32. Registered all the same, the CPU's would take such nodes, with
# copies to the host around each; the function bodies stay on the device.
_ON_CUDA = ("float16", "bfloat16")


def find_operators() -> Path | None:
    """Return the operator library's path: the variable's, or the one that `make` builds.

    None where there is none, or where the variable is set to nothing: then the function bodies
    serve. Raises ArrowheadError if the variable names no file.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        return next((path for path in BUILT if path.is_file()), None)
    if named and not Path(named).is_file():
        raise ArrowheadError(
            "operator library",
            got=f"{VARIABLE}={named}, which is no file",
            expected=f"the path of {_NAME}",
            fix=f"build it with `make plugins-cpu` (or `make plugins`), or set {VARIABLE} to "
            "nothing: then the function bodies in the graphs are used",
        )
    return Path(named) if named else None


def operators_for(graph: GraphSpec, device: str) -> Path | None:
    """Return the library that a graph's session takes. A dense graph has no operator of ours."""
    if graph.bucket is None:
        return None
    if device.startswith("cuda") and graph.outputs[0].dtype not in _ON_CUDA:
        return None
    return find_operators()


def register_operators(options: Any, path: Path) -> None:
    """Let the sessions made with these SessionOptions take the kernels.

    Raises ArrowheadError if the file cannot be loaded.
    """
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime has no common base for its exceptions
        raise ArrowheadError(
            "operator library",
            got=f"{path}: {str(error).strip().splitlines()[0]}",
            expected=f"{_NAME} built for this machine and this ONNX Runtime",
            fix=f"build it here with `make plugins-cpu` (or `make plugins`), or set {VARIABLE} to "
            "nothing: then the function bodies in the graphs are used",
        ) from error
