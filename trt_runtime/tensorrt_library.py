"""TensorRT as it is installed here: its Python module, its log, and the plugin library."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError

TENSORRT, TENSORRT_RTX = "TensorRT", "TensorRT-RTX"
OLDEST = (10, 13)

NAMESPACE, PLUGIN_VERSION = "arrowhead", "1"
OPERATORS = ("ArrowAttention", "CachedHead")
VARIABLE = "ARROWHEAD_TRT_LIBRARY"
BUILT = Path(__file__).parents[1] / "build" / "plugins" / "libarrowhead_trt.so"

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorRT:
    """The module, whose library it drives, that library's version, and this process's logger."""

    api: Any
    flavour: str
    version: str
    logger: Any

    @property
    def is_rtx(self) -> bool:
        return self.flavour == TENSORRT_RTX


@dataclass(frozen=True)
class PluginLibrary:
    """A plugin library that is loaded and registered."""

    path: Path
    version: str
    build_id: str

    @property
    def identity(self) -> dict[str, str]:
        return {"version": self.version, "build_id": self.build_id}


@cache
def tensorrt() -> TensorRT:
    """Import TensorRT, or TensorRT-RTX where that is installed; ArrowheadError says what to do."""
    reasons = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            api = importlib.import_module(name)
            bindings = tuple(int(part) for part in api.__version__.split(".")[:3])
        except (ImportError, OSError, AttributeError) as error:
            reasons.append(str(error))
            continue
        if name == "tensorrt" and bindings[:2] < OLDEST:
            raise ArrowheadError(
                "backend tensorrt",
                got=f"TensorRT {api.__version__}",
                expected=f"{OLDEST[0]}.{OLDEST[1]} or newer",
                fix="pip install 'arrowhead[tensorrt]'",
            )
        version = bindings if name == "tensorrt_rtx" else _library_version(bindings)
        # TensorRT-RTX counts from 1. Its libraries serve TensorRT's module too: same interface.
        flavour = TENSORRT_RTX if version[0] < OLDEST[0] else TENSORRT
        return TensorRT(api, flavour, ".".join(map(str, version)), _logger(api))
    raise ArrowheadError(
        "backend tensorrt",
        got="; ".join(reasons),
        expected="TensorRT 10.13 or newer, or TensorRT-RTX, with its Python module",
        fix="pip install 'arrowhead[tensorrt]'; a tar package's lib folder goes into "
        "LD_LIBRARY_PATH",
    )


def _library_version(bindings: tuple[int, ...]) -> tuple[int, ...]:
    """Ask the library that the module has loaded: its version may be another."""
    try:
        number = ctypes.CDLL(f"libnvinfer.so.{bindings[0]}").getInferLibVersion()
    except (OSError, AttributeError):  # a library under another name: a static or Windows build
        return bindings
    return number // 10000, number // 100 % 100, number % 100


def _logger(api: Any) -> Any:
    """Keep errors for messages and sizes for reports; pass all on to Python's logging."""
    severity = api.ILogger.Severity
    levels = {severity.VERBOSE: logging.DEBUG, severity.INFO: logging.DEBUG}

    class Log(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []
            self.messages: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif level == severity.INFO:
                self.messages.append(message)
            # INFO and not WARNING: TensorRT warns of much that no user can act on.
            _LOG.log(levels.get(level, logging.INFO), "%s", message)

        def clear(self) -> None:
            self.errors.clear()
            self.messages.clear()

    return Log()


def last_error(trt: TensorRT) -> str:
    """Give TensorRT's own words on what just failed, and forget them."""
    said = [" ".join(message.split()) for message in trt.logger.errors[:3]]
    trt.logger.clear()
    return "; ".join(said) or "no reason given"


def find_plugin_library() -> Path | None:
    """Return the plugin library's path: the variable's, or the one `make plugins` builds."""
    named = os.environ.get(VARIABLE)
    path = Path(named) if named else BUILT
    return path if path.is_file() else None


@cache
def load_plugins() -> PluginLibrary | None:
    """Register the plugins once a process; None where no library is and none is named.

    Raises ArrowheadError if a library is named but absent, or does not register both plugins.
    """
    path = find_plugin_library()
    if path is None:
        if os.environ.get(VARIABLE):
            raise ArrowheadError(
                "plugin library",
                got=f"no file at {os.environ[VARIABLE]}",
                expected=BUILT.name,
                fix=f"run `make plugins`, then set {VARIABLE} to the file, or unset it",
            )
        return None
    version, build_id = plugin_identity(path)
    register(tensorrt(), path)
    return PluginLibrary(path, version, build_id)


def register(trt: TensorRT, path: Path) -> None:
    """Have the global registry load a plugin library, unless its plugins are there already."""
    registry = trt.api.get_plugin_registry()
    if _missing(registry):
        # None where a static registrar was first, so what counts is who is registered after it.
        registry.load_library(str(path))
    if missing := _missing(registry):
        said = last_error(trt)
        found = ", ".join(
            f"{creator.name} version {creator.plugin_version!r} namespace "
            f"{creator.plugin_namespace!r}"
            for creator in registry.all_creators
        )
        raise ArrowheadError(
            f"plugin library {path}",
            got=f"no creator of {' and '.join(missing)} (registered: {found or 'none'}; {said})",
            expected=f"each with version {PLUGIN_VERSION!r} and namespace {NAMESPACE!r}",
            fix="build it again from this source against this TensorRT: make plugins",
        )


def _missing(registry: Any) -> list[str]:
    return [
        name for name in OPERATORS if registry.get_creator(name, PLUGIN_VERSION, NAMESPACE) is None
    ]


def plugin_identity(path: Path) -> tuple[str, str]:
    """Ask a plugin library for its version and build id; needs no TensorRT."""
    try:
        library = ctypes.CDLL(str(path))
        said = []
        for function in (library.arrowhead_version, library.arrowhead_build_id):
            function.restype = ctypes.c_char_p
            said.append(function().decode())
    except (OSError, AttributeError) as error:
        raise ArrowheadError(
            "plugin library",
            got=f"another kind of file ({error})",
            expected=f"{BUILT.name} for this machine's processor",
            fix="build it on this machine: make plugins",
        ) from error
    return said[0], said[1]
