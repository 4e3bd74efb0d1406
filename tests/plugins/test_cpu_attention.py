"""plugins/cpu without ONNX Runtime, under the sanitizers, with every kernel this processor runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.plugins.conftest import PLUGINS

SOURCES = [Path(__file__).with_name("cpu_attention_test.cpp"), *sorted(PLUGINS.glob("cpu/*.cpp"))]
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def flags_of_this_processor() -> set[str]:
    """What /proc/cpuinfo lists; empty where it is not that of an x86."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    listed = [line.split(":")[1].split() for line in lines if line.startswith("flags")]
    return set(listed[0]) if listed else set()


def kernels() -> list[str]:
    has = flags_of_this_processor()
    needs = {"avx512": {"avx512f", "avx512dq", "avx512vl", "fma"}, "avx2": {"avx2", "fma"}}
    return [name for name, flags in needs.items() if flags <= has] + ["baseline"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: apt-get install g++")
    path = tmp_path_factory.mktemp("cpu") / "cpu_attention_test"
    command = [compiler, *FLAGS, *SANITIZERS, "-I", str(PLUGINS), *map(str, SOURCES)]
    subprocess.run([*command, "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize("kernel", kernels())
def test_every_kernel_agrees_with_double(program: Path, kernel: str) -> None:
    environment = {**os.environ, "ARROWHEAD_CPU_KERNEL": kernel}
    ran = subprocess.run(
        [program], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith(f"{kernel}: ")
