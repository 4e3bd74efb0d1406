"""Finding a tritonserver, and the command line it is started with."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from plans.errors import ArrowheadError
from trt_runtime.triton import environment
from trt_runtime.triton.server import SERVER_VARIABLE, Installation, Server, find_server


def test_no_server_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SERVER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArrowheadError, match="no tritonserver on PATH.*triton.environment"):
        find_server()
    with pytest.raises(ArrowheadError, match="got no tritonserver; expected an environment"):
        find_server(tmp_path)
    monkeypatch.setenv(SERVER_VARIABLE, str(tmp_path))
    with pytest.raises(ArrowheadError, match="got no tritonserver; expected an environment"):
        find_server()


def test_the_containers_server_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(SERVER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "tritonserver").touch(mode=0o755)
    assert find_server() == Installation(tmp_path / "tritonserver")


def test_an_installed_one_brings_its_backend_and_python(installation: Installation) -> None:
    assert installation.backends is not None
    assert (installation.backends / "python" / "triton_python_backend_stub").is_file()
    path = dict(installation.variables)["PATH"].split(":")[0]
    code = "import numpy, torch, trt_runtime; print(numpy.__version__)"
    told = subprocess.run(
        [f"{path}/python", "-c", code], capture_output=True, text=True, check=True
    )
    assert told.stdout.startswith("1.")


def test_it_listens_on_the_loopback_only(tmp_path: Path) -> None:
    server = Server(tmp_path, Installation(tmp_path), explicit=True, load=["a", "b"])
    command = server.command()
    for name in ("http", "grpc", "metrics"):
        assert f"--{name}-address=127.0.0.1" in command
    assert "--load-model=a" in command and "--load-model=b" in command
    assert len({server.http, server.grpc, server.metrics}) == 3


def test_pip_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failed(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stderr="warning\nERROR: no such version\n")

    monkeypatch.setattr(environment.subprocess, "run", failed)
    with pytest.raises(ArrowheadError, match="got ERROR: no such version; expected nvidia-pytr"):
        environment.install(tmp_path / "server")
    assert not (tmp_path / "server" / "backends").exists()  # the next call starts over


def test_a_python_without_its_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_minor", lambda: "3.99")
    with pytest.raises(ArrowheadError, match=r"got no libpython3\.99\.so.*--enable-shared"):
        environment.libpython_folder()
