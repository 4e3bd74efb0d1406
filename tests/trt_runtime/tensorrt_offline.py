"""TensorRT without a GPU: an environment that builds real engines and cannot run them.

    python -m tests.trt_runtime.tensorrt_offline make engine BACKEND=tensorrt DTYPE=fp16

TensorRT's own libraries are on no public index, but its Python bindings are, and so is
TensorRT-RTX, which has the same C++ interface and builds engines ahead of time. Both are fetched
once into build/ and joined: links give TensorRT-RTX the names that the bindings ask for. Create no
timing cache and no stripped plan in it: TensorRT-RTX wants a GPU for those.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BINDINGS = "tensorrt-cu13-bindings==11.4.0.106"
LIBRARIES = "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0"

_PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
_FOLDER = ROOT / "build" / f"tensorrt-offline-11.4.0.106-rtx-1.7.1-{_PYTHON}"
_LINKS = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1.7.1",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1.7.1",
    "libtensorrt_rtx.so": "libtensorrt_rtx.so.1.7.1",  # the parser opens it for plugins
}
# The bindings want this library for one function, and nothing here calls it.
_PLUGIN_STUB = "int initLibNvInferPlugins(void *logger, const char *name) { return 1; }\n"
_MODULE = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"


class Unavailable(RuntimeError):
    """The environment cannot be made here; the message names what is missing."""


def variables() -> dict[str, str]:
    """Give the environment variables under which this Python imports `tensorrt`.

    The environment is made at the first call and kept; raises Unavailable where it cannot be.
    """
    folder = _assembled()
    old = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), *([old] if old else [])]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def _assembled() -> Path:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable("offline TensorRT: its packages are for Linux on x86_64 alone")
    _FOLDER.parent.mkdir(exist_ok=True)
    # One worker makes it, and the others wait for that one.
    with (_FOLDER.parent / "tensorrt-offline.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _FOLDER.is_dir():
            aside = Path(tempfile.mkdtemp(prefix=".tensorrt-offline.", dir=_FOLDER.parent))
            try:
                _assemble(aside)
                aside.rename(_FOLDER)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return _FOLDER


def _assemble(folder: Path) -> None:
    site, libraries = folder / "site", folder / "lib"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("offline TensorRT: no C compiler: apt-get install gcc")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    fetched = subprocess.run(
        [*command, "--retries", "1", "--target", str(site), BINDINGS, LIBRARIES],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if fetched.returncode != 0:
        last = (fetched.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise Unavailable(f"offline TensorRT: cannot fetch {BINDINGS} and {LIBRARIES}: {last}")
    libraries.mkdir()
    for name, target in _LINKS.items():
        (libraries / name).symlink_to(Path("..", "site", "onnxruntime_ep_nv_tensorrt_rtx", target))
    subprocess.run(
        [compiler, "-shared", "-x", "c", "-", "-o", str(libraries / "libnvinfer_plugin.so.11")],
        input=_PLUGIN_STUB, text=True, check=True,
    )  # fmt: skip
    (site / "tensorrt").mkdir()
    (site / "tensorrt" / "__init__.py").write_text(_MODULE)


def main() -> int:
    """Run a command in the environment."""
    if len(sys.argv) < 2:
        print("usage: python -m tests.trt_runtime.tensorrt_offline COMMAND [ARGUMENTS]")
        return 2
    try:
        environment = variables()
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    os.execvpe(sys.argv[1], sys.argv[1:], environment)


if __name__ == "__main__":
    sys.exit(main())
