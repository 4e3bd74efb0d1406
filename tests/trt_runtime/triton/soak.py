"""A long mixed load on the real server: every finished picture is held against its stored twin.

    python -m tests.trt_runtime.triton.soak --requests 2000 --pipeline flux

A fifth of the requests is cancelled, some as their picture comes, others are refused; clients are
killed; both models are unloaded and loaded meanwhile. Fails if a picture differs, if the server
grows, keeps a model that is unloaded, does not stop in order, or leaves anything when it has ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tritonclient.grpc as grpc

from plans.errors import atomic_write
from tests.testbed.models import NAMES
from tests.trt_runtime.triton.conftest import ROOT, Pixels, Twin, assert_near, decode
from tests.trt_runtime.triton.micro import PICTURES, make_bundle
from tests.trt_runtime.triton.processes import resident_bytes, stubs, wait_for
from tests.trt_runtime.triton.trained import export, missing
from trt_runtime.triton.client import Client
from trt_runtime.triton.environment import install
from trt_runtime.triton.interface import KINDS
from trt_runtime.triton.repository import Settings, write_model
from trt_runtime.triton.server import Server, find_server

PAIRS = 32
CLIENTS = 4
MODELS = ("soak", "soak_stream")
GROWTH = 0.02  # of the server's and its models' memory, last half against the first
KINDS_OF_REQUESTS = {"draw": 45, "stream": 30, "cancel": 10, "hang up": 10, "refused": 5}
_REFUSED = ("STEPS | got", "'SEED' data-type")
_AWAY = ("is not ready", "has no available versions", "is not found", "unloading", "UNAVAILABLE")
_DYING = """
import sys, time
from trt_runtime.triton.client import Client
client = Client(sys.argv[1], model="soak")
calls = [client.begin(["a red circle"], seed=i) for i in range(8)]
print("sent", flush=True)
time.sleep(60)
"""


class Enough(Exception):
    """What a client raises to hang up on its stream."""


class Soak:
    """The requests, what became of them, and what was found wrong."""

    def __init__(
        self, server: Server, twins: dict[tuple[str, int], Pixels], steps: int, pictures: int
    ) -> None:
        self.server = server
        self.steps = steps
        self.counts = (1, 1, min(2, pictures))  # pictures of a request
        self.address = f"127.0.0.1:{server.grpc}"
        self.twins = twins
        self.results: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._local = threading.local()
        self._pairs = list(twins)

    def request(self, index: int) -> None:
        """Make the request of this number, again if it finds the model away."""
        while self._once(index) == "away":
            time.sleep(0.25)

    def _once(self, index: int) -> str:
        """Make it once: what it is follows from the number alone."""
        rng = random.Random(index)
        chosen = rng.sample(self._pairs, rng.choice(self.counts))
        kind = rng.choices(tuple(KINDS_OF_REQUESTS), tuple(KINDS_OF_REQUESTS.values()))[0]
        streams = kind in ("stream", "hang up") or (kind == "refused" and index % 2 == 0)
        model = MODELS[streams]
        client = self._client(model)
        prompts, seeds = [p for p, _ in chosen], [s for _, s in chosen]
        try:
            if kind == "draw":
                self._compare(chosen, client.draw(prompts, seed=seeds).pictures)
            elif kind == "stream":
                self._compare(chosen, client.stream(prompts, seed=seeds, preview_every=4).pictures)
            elif kind == "cancel":
                call = client.begin(prompts, seed=seeds)
                time.sleep(rng.random() * 0.1)
                call.cancel()
            elif kind == "refused":  # by our model, or by the server itself
                wrong = rng.choice(({"steps": self.steps + 1}, {"seed": "seven"}))
                (client.stream if streams else client.draw)(prompts, **wrong)
                self.wrong.append(f"request {index}: {wrong} was not refused")
            else:
                hear = _hang_up_at(rng.randrange(1, self.steps), rng.random() * 0.01)
                client.stream(prompts, seed=seeds, on_progress=hear)
        except Enough:
            pass
        except client.refusal as error:
            # A model that is reloaded may be away meanwhile; nothing else may be refused.
            if any(word in str(error) for word in _AWAY):
                kind = "away"
            elif kind != "refused" or not any(word in str(error) for word in _REFUSED):
                self.wrong.append(f"request {index}, {kind}: {error}")
        self.results[kind] += 1
        return kind

    def kill_a_client(self) -> None:
        """Let a process with requests under way die."""
        child = subprocess.Popen(
            [sys.executable, "-c", _DYING, self.address], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        child.kill()
        child.wait()
        child.stdout.close()
        self.results["clients killed"] += 1

    def reload(self, model: str) -> None:
        """Unload a model under load, and load it again when its process is gone."""
        control = grpc.InferenceServerClient(self.address)
        control.unload_model(model)
        wait_for(f"unload of {model}", lambda: len(stubs(self.server)) == len(MODELS) - 1)
        control.load_model(model)
        control.close()
        self.results[f"reloads of {model}"] += 1

    def unload(self) -> list[str]:
        """Unload the models; name those that the server does not let go of."""
        control = grpc.InferenceServerClient(self.address)
        for model in MODELS:
            control.unload_model(model)
        deadline = time.monotonic() + 20
        kept = list(MODELS)
        while kept and time.monotonic() < deadline:
            time.sleep(0.1)
            index = control.get_model_repository_index().models
            kept = [model.name for model in index if model.state != "UNAVAILABLE"]
        control.close()
        return kept

    def _compare(self, chosen: list[tuple[str, int]], pictures: list[bytes]) -> None:
        for pair, png in zip(chosen, pictures, strict=True):
            try:
                assert_near(decode(png), self.twins[pair])
            except AssertionError as error:
                self.wrong.append(f"picture {pair}: {error}")
            self.results["pictures compared"] += 1

    def _client(self, model: str) -> Client:
        name = f"client_{model}"
        if not hasattr(self._local, name):
            setattr(self._local, name, Client(self.address, model=model))
        return getattr(self._local, name)


def _hang_up_at(step: int, later: float) -> Any:
    """Hang up so many seconds after a step: after the last but one, the picture is on its way."""

    def hear(done: int, _: list[bytes]) -> None:
        if done >= step:
            time.sleep(later)
            raise Enough

    return hear


def run(pipeline: str, requests: int) -> dict[str, Any]:
    """Soak a server; give what was counted and found."""
    with tempfile.TemporaryDirectory() as folder:
        if pipeline in NAMES:
            bundle = export(pipeline, Path(folder) / "bundle", pictures=2)
        else:
            bundle = make_bundle(pipeline, Path(folder))
        twin = Twin(bundle)
        prompts = (ROOT / "tests/testbed/tiny-sd3/calibration_prompts.txt").read_text().splitlines()
        pairs = list(itertools.islice(itertools.cycle(prompts), PAIRS))
        twins = {(p, seed): twin([p], [seed])[0] for seed, p in enumerate(pairs)}
        models = Path(folder) / "models"
        settings = Settings(threads=1, poison=True)
        for name, kind in zip(MODELS, KINDS, strict=True):
            write_model(bundle, models, name=name, kind=kind, settings=settings)
        installation = find_server(install(ROOT / "build" / "triton-server"))
        with Server(models, installation, explicit=True, load=MODELS) as server:
            steps = twin.pipe.transformer.plan.steps
            soak = Soak(server, twins, steps, twin.rows)
            report = _halves(soak, requests)
            report["kept"] = soak.unload()
        report["processes_left"] = stubs(server)
        report["pipeline"] = pipeline
        report["shared_memory_left"] = [str(segment) for segment in server.left]
        report["exit_status"] = server.exit_status
        report["killed"] = server.killed
    return report


def _halves(soak: Soak, requests: int) -> dict[str, Any]:
    """Make the requests, and weigh server and models after each half.

    Models are reloaded in the first half only: new processes would hide what they hold on to.
    """
    started = time.perf_counter()
    weights: list[int] = []
    half = requests // 2
    for first in (0, half):
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            jobs = []
            for index in range(first, first + half):
                done = index - first
                for number, model in enumerate(MODELS, 1):
                    if index == half * number // 4:
                        jobs.append(pool.submit(soak.reload, model))
                if done % max(1, half // 8) == half // 16:
                    jobs.append(pool.submit(soak.kill_a_client))
                jobs.append(pool.submit(soak.request, index))
            for job in jobs:
                job.result()
        wait_for(
            "the queue's end",
            lambda: not soak.server.metric("nv_inference_pending_request_count"),
        )
        weights.append(resident_bytes([soak.server.pid, *stubs(soak.server)]))
    growth = weights[1] / weights[0] - 1
    return {
        "requests": requests,
        "seconds": time.perf_counter() - started,
        "results": dict(soak.results),
        "wrong": soak.wrong,
        "resident_bytes": weights,
        "growth": growth,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument(
        "--pipeline",
        choices=(*PICTURES, *NAMES),
        default="sd3",
        help="sd3, flux: random weights, made here; else a trained one",
    )
    parser.add_argument("--output", type=Path, default=Path("build/soak.json"))
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # as the served models have it
    if arguments.pipeline in NAMES and (why := missing(arguments.pipeline)):
        print(f"skipped: {why}")
        return 0
    report = run(arguments.pipeline, arguments.requests)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(arguments.output, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    faults = {
        "pictures that differ or requests that failed": report["wrong"],
        f"growth beyond {GROWTH:.0%}": report["growth"] > GROWTH,
        f"models kept: {', '.join(report['kept'])}": report["kept"],
        f"exit status {report['exit_status']} of the server": report["exit_status"] != 0,
        "the server, or a model's process after it, had to be killed": report["killed"],
        "processes left": report["processes_left"],
        "shared memory left": report["shared_memory_left"],
    }
    if MODELS[0] in report["kept"]:
        print(f"test_final_flag.py shows Triton's part in keeping {MODELS[0]}", file=sys.stderr)
    for what in (name for name, found in faults.items() if found):
        print(f"failed: {what}", file=sys.stderr)
    return 1 if any(faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
