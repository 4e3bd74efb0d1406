"""The TensorRT plugin library, driven by the programs that `make plugins` builds beside it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from plugins.torch import library
from tests.plugins import gpu_cases
from tests.plugins.trt_cases import RECORDINGS, Call, folder_name, write_all
from tests.trt_runtime import tensorrt_offline

BUILT = Path(__file__).parents[2] / "build" / "plugins"
LIBRARY, DRIVER = BUILT / "libarrowhead_trt.so", BUILT / "arrowhead_trt_driver"
TENSORRT = "ARROWHEAD_TENSORRT_LIBRARY"
CASES = "ARROWHEAD_TRT_CASES"  # a folder that `python -m tests.plugins.trt_cases` wrote
SANITIZER = "ARROWHEAD_SANITIZER"  # as "compute-sanitizer --tool racecheck --error-exitcode 3"

built = pytest.mark.skipif(
    not (LIBRARY.is_file() and DRIVER.is_file()),
    reason=f"no {LIBRARY.name}: `make plugins` builds it where nvcc and TensorRT's headers are",
)


def run(*command: str | Path, **variables: str) -> str:
    """Run a program that has to succeed; what it said is the failure's message."""
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **variables}, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def offline_environment() -> dict[str, str]:
    """The variables of the offline TensorRT; skips where there is none for this library."""
    major = ctypes.CDLL(str(LIBRARY)).arrowhead_tensorrt_version() // 10000
    if major != 11:
        pytest.skip(
            f"{LIBRARY.name} is for TensorRT {major}, and the offline one has 11's interfaces"
        )
    try:
        return tensorrt_offline.variables()
    except tensorrt_offline.Unavailable as error:
        pytest.skip(str(error))


@built
def test_fields_types_shapes_and_serialisation() -> None:
    said = run(BUILT / "arrowhead_trt_test", LIBRARY)
    assert said.splitlines()[-1] == "0 failures"
    # Where TensorRT is of another major version its logger is not touched, so stderr has the line.
    assert "plugin library | got TensorRT version 8601; expected TensorRT 1" in said


@built
def test_a_real_registry_in_every_order_of_loading() -> None:
    path = os.environ.get(TENSORRT)
    if path is None:
        path = offline_environment()["LD_LIBRARY_PATH"].split(":")[0] + "/libnvinfer.so.11"
    said = run(BUILT / "arrowhead_trt_registry_test", LIBRARY, **{TENSORRT: path})
    assert said.count(": 0 failures\n") == len(said.splitlines()) == 8, said


@pytest.fixture(scope="module", params=RECORDINGS, ids=lambda recording: folder_name(*recording))
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of recorded calls, of both operators."""
    folder = tmp_path_factory.mktemp("calls") / folder_name(*request.param)
    if CASES in os.environ:
        shutil.copytree(Path(os.environ[CASES]) / folder.name, folder)
    else:
        write_all(folder, *request.param)
    found = sorted(folder.iterdir())
    assert {len(Call.read(one).tensors) for one in found} == {3, 4}
    return found


@built
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_driven_as_far_as_the_device(folders: list[Path]) -> None:
    said = run(DRIVER, LIBRARY, *folders, "--no-launch")
    assert said.count(": 0 failures\n") == len(folders)


def check_outputs(folders: list[Path]) -> None:
    """Compare what the driver wrote with the reference."""
    for folder in folders:
        call = Call.read(folder)
        out = call.read_output(folder)
        assert not out.isnan().any()
        q, k, v, *cache = call.tensors
        gpu_cases.check(call.case, (q, k, v, *(cache or [q])), out)


@built
def test_driven_with_plain_loops_for_kernels(folders: list[Path]) -> None:
    """What the plugins ask of the kernels is what the operators mean."""
    run(DRIVER, BUILT / "libarrowhead_trt_host.so", *folders, "--host")
    check_outputs(folders)


@pytest.mark.gpu
@built
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: plugins are not run")
def test_driven_as_tensorrt_does(folders: list[Path]) -> None:
    """Two contexts, two streams, a CUDA graph: the driver checks that all give the same bits."""
    sanitizer = os.environ.get(SANITIZER, "").split()
    # A sanitizer runs kernels one after another: more rounds would show it nothing new.
    rounds = ["--rounds", "2"] if sanitizer else []
    run(*sanitizer, DRIVER, LIBRARY, *folders, *rounds)
    check_outputs(folders)


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to list symbols")
def test_the_library_exports_what_it_promises() -> None:
    listed = run("nm", "-D", "--defined-only", LIBRARY).splitlines()
    names = {line.split()[-1] for line in listed}
    assert {name for name in names if not name.startswith("arrowhead_")} == {
        "getCreators", "setLoggerFinder",
    }  # fmt: skip
    needed = run("readelf", "-d", LIBRARY)
    assert "nvinfer" not in needed and "NODELETE" in needed


@built
def test_both_libraries_are_of_one_build() -> None:
    said = []
    for path in (LIBRARY, library.BUILT):
        functions = ctypes.CDLL(str(path))
        for name in ("version", "build_id", "architectures"):
            function = functions[f"arrowhead_{name}"]
            function.restype = ctypes.c_char_p
            said.append(function().decode())
    assert said[:3] == said[3:]
    assert len(said[1]) == 16 and "90a" in said[2].split(",")
