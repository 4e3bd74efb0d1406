"""The real server on micro models: pictures as in process, streams, cancelling, bad requests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plans.errors import ArrowheadError
from tests.trt_runtime.triton.conftest import ROOT, Twin, assert_near, decode
from tests.trt_runtime.triton.micro import PICTURES, STEPS
from trt_runtime.triton.client import Client
from trt_runtime.triton.interface import KINDS
from trt_runtime.triton.repository import Settings, write_model
from trt_runtime.triton.server import Installation, Server

pytest.importorskip("tritonclient", reason="no tritonclient: pip install 'arrowhead[triton]'")
Twins = Callable[..., Twin]
PROMPTS = ("a red circle", "a blue square above a green star", "two yellow triangles", "")
SETTINGS = Settings(threads=1, poison=True)
both = pytest.mark.parametrize("model", PICTURES)


class Enough(Exception):
    """What a client raises here when it has seen enough of a stream."""


@pytest.fixture(scope="module")
def server(
    installation: Installation,
    micro_bundle: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("models")
    for model in PICTURES:
        bundle = micro_bundle(model)
        write_model(bundle, repository, name=model, settings=SETTINGS)
        write_model(bundle, repository, name=f"{model}_stream", kind="stream", settings=SETTINGS)
    with Server(repository, installation, start_seconds=120) as running:
        yield running
        segments = running.shared_memory()
        assert segments  # else the next assertion says nothing
    assert running.clean_stop and not running.left
    assert not any(segment.exists() for segment in segments)


@pytest.fixture
def client(server: Server) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def connect(model: str, protocol: str = "grpc", **options: float) -> Client:
        port = server.grpc if protocol == "grpc" else server.http
        made.append(Client(f"127.0.0.1:{port}", model=model, protocol=protocol, **options))
        return made[-1]

    yield connect
    for each in made:
        each.close()


Clients = Callable[..., Client]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@both
def test_pictures_are_those_of_the_process(
    model: str, protocol: str, client: Clients, twin: Twins
) -> None:
    answer = client(model, protocol).draw(
        [PROMPTS[0]], seed=11, steps=STEPS, outputs=("PICTURE", "PIXELS", "TIMINGS")
    )
    (expected,) = twin(model)([PROMPTS[0]], [11])
    assert np.array_equal(decode(answer.pictures[0]), expected)
    assert answer.pixels is not None and np.array_equal(answer.pixels[0], expected)
    told = answer.timings[0]
    plan = twin(model).pipe.transformer.plan
    assert told["seed"] == 11 and [bucket for bucket, _ in told["steps"]] == list(plan.schedule)
    assert 0 < told["transformer_seconds"] < told["pipeline_seconds"] < answer.seconds


@both
def test_two_pictures_of_one_request(model: str, client: Clients, twin: Twins) -> None:
    answer = client(model).draw(PROMPTS[:2], seed=[3, 4])
    expected = twin(model)(PROMPTS[:2], [3, 4])
    for got, wanted in zip(answer.pictures, expected, strict=True):
        assert np.array_equal(decode(got), wanted)


def test_only_what_is_asked_for_is_sent(client: Clients) -> None:
    answer = client("flux").draw([PROMPTS[0]], outputs=("TIMINGS",))
    assert not answer.pictures and answer.pixels is None


def test_a_seed_left_out_is_told_and_repeats_the_picture(client: Clients) -> None:
    first, second = (client("flux").draw([PROMPTS[0]]) for _ in range(2))
    assert first.pictures != second.pictures
    again = client("flux").draw([PROMPTS[0]], seed=first.timings[0]["seed"])
    assert again.pictures == first.pictures


def test_guidance_and_negative_prompt(client: Clients, twin: Twins) -> None:
    got = client("sd3").draw([PROMPTS[0]], seed=1, guidance=6.0, negative_prompt="a square")
    (expected,) = twin("sd3")(
        [PROMPTS[0]], [1], guidance_scale=6.0, negative_prompt=["a square"] * 2
    )
    assert np.array_equal(decode(got.pictures[0]), expected)
    assert got.pictures != client("sd3").draw([PROMPTS[0]], seed=1).pictures


@both
def test_embeddings_in_place_of_the_prompt(model: str, client: Clients, twin: Twins) -> None:
    pipe = twin(model).pipe
    with torch.no_grad():
        if model == "sd3":
            text, _, pooled, _ = pipe.encode_prompt(PROMPTS[0], None, None, max_sequence_length=49)
        else:
            text, pooled, _ = pipe.encode_prompt(PROMPTS[0], None, max_sequence_length=49)
    answer = client(model).draw(prompt_embeds=text, pooled_prompt_embeds=pooled, seed=5)
    assert_near(decode(answer.pictures[0]), twin(model)([PROMPTS[0]], [5])[0])


@both
def test_requests_share_calls_and_keep_to_themselves(
    model: str, server: Server, client: Clients, twin: Twins
) -> None:
    """Poisoned caches, other guidances between: a leak of one request into another would show."""
    wanted = [(PROMPTS[i % 4], i, 4.0 if i % 3 else 7.0) for i in range(24)]
    before = [
        server.metric(f"nv_inference_{name}", model=model) for name in ("count", "exec_count")
    ]
    clients = [client(model) for _ in range(6)]

    def draw(index: int) -> Any:
        done = []
        for prompt, seed, guidance in wanted[index::6]:
            answer = clients[index].draw([prompt], seed=seed, guidance=guidance)
            done.append((prompt, seed, guidance, decode(answer.pictures[0])))
        return done

    with ThreadPoolExecutor(6) as pool:
        served = [row for rows in pool.map(draw, range(6)) for row in rows]
    assert len(served) == 24
    for prompt, seed, guidance, got in served:
        assert_near(got, twin(model)([prompt], [seed], guidance_scale=guidance)[0])
    after = [server.metric(f"nv_inference_{name}", model=model) for name in ("count", "exec_count")]
    pictures, executions = (b - a for a, b in zip(before, after, strict=True))
    assert pictures == 24 and executions < 24


@both
def test_a_stream_tells_each_step(model: str, client: Clients, twin: Twins) -> None:
    steps, previews = [], {}

    def hear(done: int, pictures: list[bytes]) -> None:
        steps.append(done)
        if pictures:
            previews[done] = decode(pictures[0])

    answer = client(f"{model}_stream").stream(
        [PROMPTS[1]], seed=2, preview_every=3, on_progress=hear
    )
    assert steps == list(range(1, STEPS + 1))
    assert sorted(previews) == [3, 6] and previews[3].shape == (64, 96, 3)
    assert np.array_equal(decode(answer.pictures[0]), twin(model)([PROMPTS[1]], [2])[0])


@both
def test_cancelled_streams_leave_nothing_behind(
    model: str, server: Server, client: Clients, twin: Twins
) -> None:
    def hang_up(done: int, _: list[bytes]) -> None:
        if done == 2:
            raise Enough

    before = server.metric("arrowhead_requests_total", model=f"{model}_stream", result="cancelled")
    for seed in range(20):
        with pytest.raises(Enough):
            client(f"{model}_stream").stream(
                [PROMPTS[1]], seed=seed, preview_every=1, on_progress=hang_up
            )
        got = client(f"{model}_stream").stream([PROMPTS[0]], seed=seed)
        assert np.array_equal(decode(got.pictures[0]), twin(model)([PROMPTS[0]], [seed])[0])
    after = server.metric("arrowhead_requests_total", model=f"{model}_stream", result="cancelled")
    # A micro step takes three milliseconds: some streams are over before the word arrives.
    assert 10 <= after - before <= 20


@both
def test_cancelled_requests_are_not_drawn(
    model: str, server: Server, client: Clients, twin: Twins
) -> None:
    before = server.metric("arrowhead_pictures_total", model=model)
    calls = [client(model).begin([PROMPTS[i % 4]], seed=i) for i in range(40)]
    for call in calls[5:]:
        call.cancel()
    got = client(model).draw([PROMPTS[0]], seed=8)
    assert_near(decode(got.pictures[0]), twin(model)([PROMPTS[0]], [8])[0])
    assert server.metric("arrowhead_pictures_total", model=model) - before < 30


@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_an_answer_that_does_not_come_in_time_is_given_up(
    way: str, client: Clients, twin: Twins
) -> None:
    model, protocol = (
        "sd3_stream" if way == "stream" else "sd3",
        "http" if way == "http" else "grpc",
    )
    patient, hurried = client(model, protocol), client(model, protocol, seconds=0.005)
    draw = {each: each.stream if way == "stream" else each.draw for each in (patient, hurried)}
    late = r"sd3\w* on 127.0.0.1:\d+ \| got no answer; expected one within 0.005 s. Fix: "
    for _ in range(3):
        with pytest.raises(ArrowheadError, match=late):
            for seed in range(100):  # one who slept while the picture came has it in time
                draw[hurried]([PROMPTS[0]], seed=seed)
    got = draw[patient]([PROMPTS[0]], seed=8)
    assert_near(decode(got.pictures[0]), twin("sd3")([PROMPTS[0]], [8])[0])


def test_a_client_that_dies_is_cancelled(server: Server, client: Clients, twin: Twins) -> None:
    code = (
        "import sys, time\n"
        "from trt_runtime.triton.client import Client\n"
        "client = Client(sys.argv[1], model='sd3')\n"
        "calls = [client.begin(['a red circle'], seed=i) for i in range(60)]\n"
        "print('sent', flush=True); time.sleep(60)\n"
    )
    before = server.metric("arrowhead_pictures_total", model="sd3")
    child = subprocess.Popen(
        [sys.executable, "-c", code, f"127.0.0.1:{server.grpc}"], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"sent\n"
    child.kill()
    child.wait()
    child.stdout.close()
    got = client("sd3").draw([PROMPTS[0]], seed=8)
    assert_near(decode(got.pictures[0]), twin("sd3")([PROMPTS[0]], [8])[0])
    deadline = time.monotonic() + 30
    while server.metric("nv_inference_pending_request_count", model="sd3"):
        assert time.monotonic() < deadline, "the dead client's requests still wait"
        time.sleep(0.05)
    assert server.metric("arrowhead_pictures_total", model="sd3") - before < 50


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"steps": 50}, r"STEPS \| got 50; expected 8, as planned. Fix: send 8 or leave"),
        ({"height": 1024}, r"HEIGHT \| got 1024; expected 64, as planned. Fix: "),
        ({"width": 0}, r"WIDTH \| got 0; expected 96, as planned. Fix: "),
        ({"seed": -1}, r"SEED \| got -1; expected 0 or more. Fix: "),
        ({"guidance": 1.0}, r"GUIDANCE \| got 1; expected above 1, at most 100. Fix: "),
        ({"guidance": float("inf")}, r"GUIDANCE \| got inf; .* Fix: leave GUIDANCE out"),
        ({"prompts": [b"caf\xe9"]}, r"PROMPT \| got byte 0xe9 at 3, which is not UTF-8; .* Fix: "),
        ({"prompts": ["a" * 10_000_000]}, r"got 10000000 bytes; expected at most 8192. Fix: short"),
        ({"prompts": [], "seed": 3}, r"PROMPT \| got nothing; .* Fix: send PROMPT as BYTES"),
        ({"prompts": ["a", "b", "c"]}, r"batch-size must be <= 2"),  # Triton's own, from here on
        ({"seed": "seven"}, r"'SEED' data-type is 'BYTES', but model .* expects 'INT64'"),
        ({"sampler": 1}, r"unexpected inference input 'SAMPLER'"),
        ({"prompt_embeds": np.zeros((1, 3, 192))}, r"PROMPT_EMBEDS.*Expected \[-1,97,192\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_requests_are_refused_by_name(
    kind: str, inputs: dict[str, Any], message: str, client: Clients, twin: Twins
) -> None:
    caller = client("sd3_stream" if kind == "stream" else "sd3")
    draw = caller.stream if kind == "stream" else caller.draw
    with pytest.raises(caller.refusal, match=message):
        draw(**({"prompts": ["a red circle"]} | inputs))
    got = draw([PROMPTS[0]], seed=1)
    assert np.array_equal(decode(got.pictures[0]), twin("sd3")([PROMPTS[0]], [1])[0])


def test_flux_takes_no_negative_prompt(client: Clients) -> None:
    caller = client("flux")
    with pytest.raises(caller.refusal, match="unexpected inference input 'NEGATIVE_PROMPT'"):
        caller.draw([PROMPTS[0]], negative_prompt="a square")


@both
def test_one_bad_request_does_not_spoil_its_neighbours(
    model: str, client: Clients, twin: Twins
) -> None:
    clients = [client(model) for _ in range(4)]

    def draw(index: int) -> Any:
        try:
            steps = STEPS if index % 2 else STEPS + 1
            return clients[index].draw([PROMPTS[0]], seed=index, steps=steps).pictures[0]
        except clients[index].refusal as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(draw, range(4)))
            assert all("STEPS | got 9" in got[i] for i in (0, 2))
            for i in (1, 3):
                assert_near(decode(got[i]), twin(model)([PROMPTS[0]], [i])[0])


def test_metrics_tell_pictures_steps_and_caches(
    server: Server, client: Clients, twin: Twins
) -> None:
    plan = twin("flux").pipe.transformer.plan

    def read() -> list[float]:
        steps = [
            server.metric("arrowhead_steps_total", model="flux", bucket=str(bucket))
            for bucket in range(len(plan.buckets))
        ]
        return [server.metric("arrowhead_pictures_total", model="flux"), *steps]

    before = read()
    client("flux").draw([PROMPTS[0]], seed=0)
    ran = [plan.schedule.count(bucket) for bucket in range(len(plan.buckets))]
    assert [b - a for a, b in zip(before, read(), strict=True)] == [1, *ran]
    twin("flux")([PROMPTS[0]], [0])
    cached = twin("flux").pipe.transformer.state.cache_bytes()
    assert server.metric("arrowhead_cache_bytes", model="flux", version="1") == cached > 0
