"""What this machine can run, and what to install for more."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from plans.errors import ArrowheadError
from plugins.torch.library import find_library, load_library
from trt_runtime.onnxruntime_operators import find_operators, register_operators
from trt_runtime.tensorrt_library import find_plugin_library, plugin_identity, tensorrt
from trt_runtime.triton.server import find_server

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; install is empty where nothing is missing."""

    subject: str
    ok: bool
    found: str
    good_for: str
    install: str = ""


def versions() -> dict[str, str]:
    """Versions of this project, Python and the packages it runs on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in ("arrowhead", *_PACKAGES):
        version = _version(name)
        if version:
            found[name] = version
    return found


def device_name(device: str = "cpu") -> str:
    """Name the processor pictures are made on."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def git_commit() -> str | None:
    """Commit of the checkout this package lies in, with + where it was changed; None outside."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def examine() -> list[Finding]:
    """Look at everything the project can use; never raises for what is missing."""
    return [
        _python(),
        _torch(),
        _gpu(),
        _package("diffusers", "pipelines, plan search", "pip install diffusers"),
        _package("onnx", "export", "pip install 'arrowhead[export]'"),
        _package("onnxscript", "export", "pip install 'arrowhead[export]'"),
        _onnxruntime(),
        _onnxruntime_cuda(),
        _onnxruntime_operators(),
        _tensorrt(),
        _plugin_library(),
        _kernel_library(),
        _nvcc(),
        _triton(),
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, good_for: str, install: str) -> Finding:
    version = _version(name)
    return Finding(
        name, version is not None, version or "not installed", good_for, "" if version else install
    )


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding(
        "Python", ok, platform.python_version(), "everything", "" if ok else "Python 3.11 or newer"
    )


def _torch() -> Finding:
    return _package("torch", "plan search, backends torch and torch-compile", "pip install torch")


def _gpu() -> Finding:
    good_for = "fast search; backends onnxruntime on CUDA, TensorRT"
    try:
        import torch

        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            name = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
            return Finding("NVIDIA GPU", True, f"{name}, CUDA {torch.version.cuda}", good_for)
    except (ImportError, RuntimeError) as error:
        return Finding("NVIDIA GPU", False, str(error), good_for, "an NVIDIA driver that works")
    if shutil.which("nvidia-smi"):
        return Finding(
            "NVIDIA GPU",
            False,
            "a driver, but this PyTorch is built without CUDA",
            good_for,
            "a CUDA build of PyTorch",
        )
    return Finding("NVIDIA GPU", False, "none", good_for, "an NVIDIA GPU and its driver")


def _providers() -> list[str]:
    try:
        return list(importlib.import_module("onnxruntime").get_available_providers())
    except (ImportError, AttributeError):
        return []


def _onnxruntime() -> Finding:
    ok = "CPUExecutionProvider" in _providers()
    version = _version("onnxruntime") or _version("onnxruntime-gpu") or "not installed"
    return Finding(
        "ONNX Runtime CPU",
        ok,
        version,
        "backend onnxruntime, fp32 and fp16",
        "" if ok else "pip install 'arrowhead[onnxruntime]'",
    )


def _onnxruntime_cuda() -> Finding:
    ok = "CUDAExecutionProvider" in _providers()
    install = (
        "on a machine with a GPU, in place of onnxruntime: pip install 'arrowhead[onnxruntime-gpu]'"
    )
    return Finding(
        "ONNX Runtime CUDA",
        ok,
        "available" if ok else "no CUDA provider",
        "backend onnxruntime with --device cuda",
        "" if ok else install,
    )


def _onnxruntime_operators() -> Finding:
    subject = "ONNX Runtime operators"
    good_for = "backend onnxruntime: attention as one kernel, arrow heads at what they keep"
    try:
        path = find_operators()
        if path is not None and _providers():
            options = importlib.import_module("onnxruntime").SessionOptions()
            register_operators(options, path)
    except ArrowheadError as error:
        return Finding(subject, False, str(error.got), good_for, error.fix)
    if path is not None:
        return Finding(subject, True, str(path), good_for)
    install = (
        "make plugins-cpu (a C++ compiler and ONNX Runtime's headers: on Debian 13 "
        "apt-get install g++ libonnxruntime-dev)"
    )
    return Finding(subject, False, "not built: function bodies are used", good_for, install)


def _tensorrt() -> Finding:
    try:
        found = tensorrt()
    except ArrowheadError as error:
        return Finding("TensorRT", False, str(error.got), "backend tensorrt", error.fix)
    bindings = f"bindings {found.api.__version__}"
    where = "builds here, runs where a GPU is" if found.is_rtx else "builds and runs with a GPU"
    text = f"{found.flavour} {found.version}, {bindings}"
    return Finding("TensorRT", True, text, f"backend tensorrt: {where}")


def _plugin_library() -> Finding:
    good_for = "backend tensorrt: the operators as plugins"
    path = find_plugin_library()
    if path is None:
        fix = "make plugins, with nvcc and TensorRT's headers"
        return Finding("TensorRT plugin library", False, "none", good_for, fix)
    try:
        version, build_id = plugin_identity(path)
    except ArrowheadError as error:
        return Finding("TensorRT plugin library", False, str(error.got), good_for, error.fix)
    text = f"{path}, version {version}, build {build_id}"
    return Finding("TensorRT plugin library", True, text, good_for)


def _kernel_library() -> Finding:
    good_for = (
        "backends torch, torch-compile with --device cuda, fp16, bf16: attention in one kernel"
    )
    try:
        load_library()
    except ArrowheadError as error:
        return Finding("kernel library", False, str(error.got), good_for, error.fix)
    return Finding("kernel library", True, str(find_library()), good_for)


def _nvcc() -> Finding:
    path = shutil.which("nvcc")
    return Finding(
        "nvcc",
        path is not None,
        path or "not on PATH",
        "building the kernel library: make plugins",
        "" if path else "the CUDA toolkit, 12.3 or newer",
    )


def _triton() -> Finding:
    good_for = "arrowhead triton --check, bench serve, soak"
    try:
        server = find_server()
    except ArrowheadError as error:
        return Finding("tritonserver", False, str(error.got), good_for, error.fix)
    return Finding("tritonserver", True, str(server.executable), good_for)
