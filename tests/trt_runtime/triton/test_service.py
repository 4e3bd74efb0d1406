"""The owner of a served pipeline: shared calls, interruption, and caches of one call only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trt_runtime.triton.conftest import Twin, assert_near, decode
from tests.trt_runtime.triton.micro import STEPS
from trt_runtime.triton.request import Asked
from trt_runtime.triton.service import PictureService, Preview, png

Twins = Callable[..., Twin]


class Stopped(Exception):
    """What a step raises here to end a call."""


def ignore(done: int, preview: Preview | None) -> None:
    pass


def asked(prompt: str, seed: int, **more: Any) -> Asked:
    return Asked(**({"seeds": (seed,), "guidance": 4.0, "prompts": (prompt,)} | more))


@pytest.fixture(scope="module", params=["sd3", "flux"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def service(kind: str, micro_bundle: Callable[..., Path]) -> Iterator[PictureService]:
    owner = PictureService(micro_bundle(kind), threads=1, poison=True)
    yield owner
    owner.close()


def pixels(drawn: list[list[Any]]) -> list[Any]:
    return [np.asarray(picture.image) for pictures in drawn for picture in pictures]


def test_a_lone_request_is_as_in_process(service: PictureService, kind: str, twin: Twins) -> None:
    (got,) = pixels(service.draw([asked("a red circle", 5)], ignore))
    assert np.array_equal(got, twin(kind)(["a red circle"], [5])[0])
    assert len(service.buckets_run()) == STEPS
    assert np.array_equal(decode(png(service.pipe.image_processor.numpy_to_pil(got / 255)[0])), got)


def test_a_stopped_call_leaves_nothing_behind(
    service: PictureService, kind: str, twin: Twins
) -> None:
    for last in range(1, STEPS):

        def stop(done: int, preview: Preview | None, last: int = last) -> None:
            if done == last:
                raise Stopped

        with pytest.raises(Stopped):
            service.draw([asked("a green star", 1)], stop)
        assert len(service.buckets_run()) == last
        assert not service.transformer.state.started
        for context in service.transformer.state._contexts.values():
            assert all(torch.isnan(cache).all() for cache in context.caches.values())
    (got,) = pixels(service.draw([asked("a red circle", 2)], ignore))
    assert np.array_equal(got, twin(kind)(["a red circle"], [2])[0])


def test_a_call_that_never_began_ran_no_steps(service: PictureService) -> None:
    service.draw([asked("a red circle", 0)], ignore)
    both = asked("a red circle", 0, embeddings={"prompt_embeds": np.ones((1, 2, 3), np.float32)})
    with pytest.raises(ValueError, match="prompt_embeds"):
        service.draw([both], ignore)
    assert service.buckets_run() == []


def test_the_last_preview_is_the_picture(service: PictureService) -> None:
    """The foreseen latents are the last step's own when there is no noise left to take off."""
    seen: dict[int, Any] = {}

    def look(done: int, preview: Preview | None) -> None:
        if preview is not None:
            seen[done] = np.asarray(preview()[0])

    (got,) = pixels(service.draw([asked("a red circle", 5)], look))
    assert sorted(seen) == list(range(2, STEPS + 1))
    assert np.array_equal(seen[STEPS], got)
    assert len({image.tobytes() for image in seen.values()}) == STEPS - 1


def test_requests_share_a_call(service: PictureService, kind: str, twin: Twins) -> None:
    got = pixels(service.draw([asked("a red circle", 5), asked("a blue square", 9)], ignore))
    together = twin(kind)(["a red circle", "a blue square"], [5, 9])
    assert all(np.array_equal(a, b) for a, b in zip(got, together, strict=True))
    assert_near(got[1], twin(kind)(["a blue square"], [9])[0])


def test_one_of_two_has_a_negative_prompt(micro_bundle: Callable[..., Path], twin: Twins) -> None:
    owner = PictureService(micro_bundle("sd3"), threads=1, poison=True)
    # The other's is empty.
    got = pixels(
        owner.draw(
            [asked("a red circle", 5), asked("a red circle", 5, negatives=("a star",))], ignore
        )
    )
    assert_near(got[0], twin("sd3")(["a red circle"], [5])[0])
    assert_near(got[1], twin("sd3")(["a red circle"], [5], negative_prompt=["a star"] * 2)[0])
    assert not np.array_equal(got[0], got[1])
    owner.close()


def test_another_requests_caches_would_show(micro_bundle: Callable[..., Path], twin: Twins) -> None:
    """Why comparing pictures finds a leak: caches of another run change the picture."""
    owner = PictureService(micro_bundle("sd3"), threads=1)
    kept: dict[str, Any] = {}

    def caches() -> dict[str, Any]:
        return owner.transformer.state._contexts["default"].caches

    def keep(done: int, preview: Preview | None) -> None:
        if done == 1:
            kept.update({name: cache.clone() for name, cache in caches().items()})

    def leak(done: int, preview: Preview | None) -> None:
        if done == 1:
            for name, cache in caches().items():
                cache.copy_(kept[name])

    owner.draw([asked("a blue square", 9)], keep)
    (leaked,) = pixels(owner.draw([asked("a red circle", 5)], leak))
    expected = twin("sd3")(["a red circle"], [5])[0]
    with pytest.raises(AssertionError, match="values differ"):
        assert_near(leaked, expected)
    assert np.array_equal(pixels(owner.draw([asked("a red circle", 5)], ignore))[0], expected)
    owner.close()
