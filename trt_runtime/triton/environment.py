"""Install a real tritonserver without a container: the CPU build that a wheel carries.

    python -m trt_runtime.triton.environment build/triton-server

For tests, `arrowhead triton --check` and `arrowhead bench serve`; production has the container.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from plans.errors import ArrowheadError, atomic_write

# The one wheel with the whole server, Triton 2.51 (24.10); its own dependencies serve another API.
SERVER_WHEEL = "nvidia-pytriton==0.7.0"
# That server's Python backend reads NumPy 2 arrays as zeros, so it gets a NumPy of its own.
NUMPY = "numpy>=1.26,<2"
_LAYER = "arrowhead_layer.pth"


def install(folder: Path) -> Path:
    """Make a virtual environment with a tritonserver and NumPy 1 over this one's packages.

    All else the model imports (PyTorch, diffusers, this project) comes from the environment that
    runs this. Does nothing if the folder is complete. Raises ArrowheadError if pip fails or this
    Python has no shared library for the server to load.
    """
    folder = folder.resolve()
    if (folder / "backends").is_dir():
        return folder
    libpython_folder()
    venv.create(folder, with_pip=False, clear=True, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    done = subprocess.run(
        [*command, "--no-deps", SERVER_WHEEL, NUMPY], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ArrowheadError(
            f"tritonserver in {folder}",
            got=(done.stderr.strip().splitlines() or ["pip failed"])[-1],
            expected=f"{SERVER_WHEEL} and {NUMPY} installed by pip",
            fix="check that pip works here; the wheel needs x86-64 Linux with glibc 2.35 or newer",
        )
    packages = _packages(folder)
    # addsitedir, not a bare path: it reads the .pth files of an editable install too.
    atomic_write(
        packages / _LAYER, f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n"
    )
    _link_backend(packages / "pytriton" / "tritonserver", folder / "backends")
    return folder


def server_files(folder: Path) -> tuple[Path, Path]:
    """Give the tritonserver executable and the folder of backends in an installed environment."""
    folder = folder.resolve()
    executable = _packages(folder) / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    if not executable.is_file() or not (folder / "backends").is_dir():
        raise ArrowheadError(
            f"Triton in {folder}",
            got="no tritonserver",
            expected=f"an environment with {SERVER_WHEEL}",
            fix=f"python -m trt_runtime.triton.environment {folder.name}",
        )
    return executable, folder / "backends"


def libpython_folder() -> Path:
    """Find the folder of libpython, which the server's stub loads but does not carry."""
    name = f"libpython{_minor()}.so.1.0"
    folder = Path(sysconfig.get_config_var("LIBDIR") or "")
    if not (folder / name).is_file():
        try:
            ctypes.CDLL(name)
        except OSError as error:
            raise ArrowheadError(
                f"Python at {sys.base_prefix}",
                got=f"no {name}",
                expected="the shared library, which Triton's Python backend loads",
                fix=f"apt-get install libpython{_minor()}, or a Python built with --enable-shared",
            ) from error
    return folder


def _link_backend(server: Path, backends: Path) -> None:
    """Put this Python's stub beside the backend; the links must lead to where its libraries lie."""
    stub = server / "python_backend_stubs" / _minor() / "triton_python_backend_stub"
    if not stub.is_file():
        versions = sorted(path.name for path in stub.parents[1].iterdir())
        raise ArrowheadError(
            "Triton's Python backend",
            got=f"Python {_minor()}",
            expected=f"one of {', '.join(versions)}",
            fix="make the project's environment with one of these",
        )
    aside = backends.with_suffix(".tmp") / "python"
    aside.mkdir(parents=True, exist_ok=True)
    own = server / "backends" / "python"
    for file in (own / "libtriton_python.so", own / "triton_python_backend_utils.py", stub):
        (aside / file.name).unlink(missing_ok=True)
        (aside / file.name).symlink_to(file)
    aside.parent.rename(backends)


def _minor() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _packages(folder: Path) -> Path:
    return folder / "lib" / f"python{_minor()}" / "site-packages"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(f"tritonserver: {server_files(install(parser.parse_args().folder))[0]}")


if __name__ == "__main__":
    main()
