"""Start a tritonserver on a model repository, on the loopback only, and stop it without a trace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from plans.errors import ArrowheadError
from trt_runtime.triton.environment import libpython_folder, server_files
from trt_runtime.triton.orphan import SHARED_MEMORY, parent_and_group

SERVER_VARIABLE = "ARROWHEAD_TRITON"
_HOST = "127.0.0.1"
_EXIT_SECONDS = 30  # Triton's own deadline for its stop; past it it ends with status 1
_ORPHAN_SECONDS = 5.0  # for the models' processes to end after a server that did not tell them


@dataclass(frozen=True)
class Installation:
    """A tritonserver, and what its process needs in the environment."""

    executable: Path
    backends: Path | None = None
    variables: tuple[tuple[str, str], ...] = ()


def find_server(folder: Path | None = None) -> Installation:
    """Find a tritonserver: in `folder`, where ARROWHEAD_TRITON says, or on PATH (the container).

    folder: an environment that trt_runtime.triton.environment made.
    """
    named = os.environ.get(SERVER_VARIABLE)
    folder = folder or (Path(named) if named else None)
    if folder is not None:
        executable, backends = server_files(folder)
        # The stub asks PATH for its Python, and ignores PYTHONPATH.
        path = f"{folder.resolve() / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        variables = (("PATH", path), ("LD_LIBRARY_PATH", str(libpython_folder())))
        return Installation(executable, backends, variables)
    found = shutil.which("tritonserver")
    if found is None:
        raise ArrowheadError(
            "Triton",
            got="no tritonserver on PATH",
            expected="Triton's container, or the CPU server of the tests",
            fix="python -m trt_runtime.triton.environment build/triton-server, then pass "
            f"--server build/triton-server or set {SERVER_VARIABLE} to it",
        )
    return Installation(Path(found))


class Server:
    """A running tritonserver; `with Server(repository) as server` waits until it is ready.

    Ports are free ones of 127.0.0.1. explicit: models are loaded and unloaded by the client, none
    at the start but those of `load`. arguments: more options of tritonserver's.
    """

    def __init__(
        self,
        repository: Path | str,
        installation: Installation | None = None,
        *,
        explicit: bool = False,
        load: Sequence[str] = (),
        arguments: Sequence[str] = (),
        start_seconds: float = 300,
    ) -> None:
        self.repository = Path(repository).resolve()
        self.installation = installation or find_server()
        self.start_seconds = start_seconds
        self.http, self.grpc, self.metrics = _free_ports(3)
        self.shared_memory_prefix = f"arrowhead_{uuid.uuid4().hex[:8]}_"
        self._arguments = list(arguments)
        if explicit:
            self._arguments += ["--model-control-mode=explicit"]
            self._arguments += [f"--load-model={name}" for name in load]
        self._log = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()
        # Of the stop: the status (negative: the signal that ended it), whether it, or a model's
        # process after it, took a SIGKILL of ours, and the shared memory that was left.
        self.exit_status: int | None = None
        self.killed = False
        self.left: list[Path] = []

    @property
    def clean_stop(self) -> bool:
        """Whether it has stopped, in time and by itself."""
        return self.exit_status == 0 and not self.killed

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server runs only inside its `with` block"
        return self._process.pid

    def command(self) -> list[str]:
        """Give the command line that starts it."""
        chosen = self.installation
        ports = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}
        return [
            str(chosen.executable),
            f"--model-repository={self.repository}",
            *([f"--backend-directory={chosen.backends}"] if chosen.backends else []),
            # The written config is complete; asking each model.py for it costs a second a model.
            "--disable-auto-complete-config",
            *(f"--{name}-address={_HOST}" for name in ports),
            *(f"--{name}-port={port}" for name, port in ports.items()),
            f"--backend-config=python,shm-region-prefix-name={self.shared_memory_prefix}",
            f"--exit-timeout-secs={_EXIT_SECONDS}",
            *self._arguments,
        ]

    def __enter__(self) -> Self:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        self._log = Path(folder) / "tritonserver.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(),
                env=os.environ | dict(self.installation.variables),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop(patience=0)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._stop(patience=_EXIT_SECONDS + 10)

    def log(self) -> str:
        """Give all it has printed."""
        return self._log.read_text(errors="replace") if self._log.is_file() else ""

    def shared_memory(self) -> list[Path]:
        """List the shared-memory segments that are this server's."""
        return sorted(SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"))

    def metric(self, name: str, **labels: str) -> float:
        """Sum the samples of one metric that have these labels."""
        with urllib.request.urlopen(f"http://{_HOST}:{self.metrics}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.split("{")[0].split(" ")[0] == name and all(text in line for text in wanted)
        )

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.start_seconds
        while True:
            code = self._process.poll()
            # A stub that cannot start leaves the server waiting for ever: hence the deadline.
            if code is not None or time.monotonic() > deadline:
                got = "no answer" if code is None else f"exit status {code}"
                raise ArrowheadError(
                    f"tritonserver on {self.repository}",
                    got=f"{got} after {self._complaint()}",
                    expected=f"a ready server within {self.start_seconds:g} s",
                    fix="mend what the log names; `arrowhead triton` writes the repository anew",
                )
            if self._answers():
                return
            time.sleep(0.02)

    def _answers(self) -> bool:
        # The metrics page comes a moment after the models.
        pages = (f"{self.http}/v2/health/ready", f"{self.metrics}/metrics")
        try:
            for page in pages:
                with urllib.request.urlopen(f"http://{_HOST}:{page}", timeout=1):
                    pass
        except (urllib.error.URLError, OSError):
            return False
        return True

    def _complaint(self) -> str:
        """Give the line of the log that says most: an error of ours, of Triton's, or the last."""
        lines = [line.strip() for line in self.log().splitlines() if line.strip()]
        ours = [line for line in lines if " | got " in line]
        # Triton's errors begin with E and the date; the first ones only say that there is no GPU.
        errors = [line for line in lines if re.match(r"E\d{4} ", line) and "Cuda" not in line]
        return (ours or errors[-1:] or lines[-1:] or ["an empty log"])[0][:600]

    def _stop(self, patience: float) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None and patience:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
            if process.poll() is None:
                self.killed = True
                process.kill()
            self.exit_status = process.wait()
            # Models' processes are of the same group.
            deadline = time.monotonic() + (_ORPHAN_SECONDS if patience else 0)
            while _group_runs(process.pid) and time.monotonic() < deadline:
                time.sleep(0.02)
            if _group_runs(process.pid):
                self.killed = True
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        self.left = self.shared_memory()
        for segment in self.left:
            segment.unlink(missing_ok=True)
        self._stack.close()


def _group_runs(group: int) -> bool:
    processes = (parent_and_group(each.name) for each in Path("/proc").glob("[0-9]*"))
    return any(found is not None and found[1] == group for found in processes)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_HOST, 0))
        return [each.getsockname()[1] for each in sockets]
