"""Random attention problems for the GPU tests: strided, poisoned, any mix of modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from plans import reference, sdpa
from plans.tiles import CACHED
from plugins.torch.attention import launch, tasks_of

GUARD = 3.0  # what surrounds an output; nothing may touch it


@dataclass(frozen=True)
class Case:
    batch: int
    image: int
    text: int
    text_first: bool
    head_dim: int
    block: int
    half_windows: tuple[int, ...]  # of the computed heads
    source: tuple[int, ...]  # as in plans.reference.cached_head
    cached: int
    dtype: torch.dtype
    seed: int

    @property
    def seq_len(self) -> int:
        return self.image + self.text

    @property
    def layout(self) -> dict[str, Any]:
        return {
            "scale": self.head_dim**-0.5,
            "text_tokens": self.text,
            "text_first": self.text_first,
            "block": self.block,
        }

    def modes(self) -> list[int]:
        computed = len(self.half_windows)
        return [CACHED if i >= computed else self.half_windows[i] for i in self.source]


@st.composite
def cases(draw: st.DrawFn, max_image: int = 1400) -> Case:
    computed = draw(st.integers(1, 4))
    cached = draw(st.integers(0, 2))
    image = draw(st.one_of(st.integers(0, max_image), st.sampled_from([128, 512, 1024, 1280])))
    text = draw(st.one_of(st.integers(0, 400), st.sampled_from([0, 77, 128, 333])))
    return Case(
        batch=draw(st.integers(1, 3)),
        image=image,
        text=max(text, 0 if image else 1),
        text_first=draw(st.booleans()),
        head_dim=draw(st.sampled_from([64, 128])),
        block=draw(st.one_of(st.just(128), st.sampled_from([1, 16, 64, 100, 192, 256]))),
        half_windows=tuple(
            draw(st.one_of(st.just(-1), st.integers(0, 8))) for _ in range(computed)
        ),
        source=tuple(draw(st.lists(st.integers(0, computed + cached - 1), min_size=1, max_size=6))),
        cached=cached,
        dtype=draw(st.sampled_from([torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 2**31)),
    )


def strided(case: Case, heads: int, generator: torch.Generator) -> Tensor:
    """Random [B, S, heads, D] inside a larger tensor of NaN: what lies around must not be read."""
    whole = torch.full(
        (case.batch, case.seq_len + 5, heads + 1, case.head_dim + 8),
        torch.nan, dtype=case.dtype, device="cuda",
    )  # fmt: skip
    inside = whole[:, 2 : 2 + case.seq_len, :heads, : case.head_dim]
    inside.copy_(torch.randn(inside.shape, generator=generator, device="cuda"))
    return inside


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, S, h, D] and cache [B, S, c, D]."""
    generator = torch.Generator("cuda").manual_seed(case.seed)
    q, k, v = (strided(case, len(case.half_windows), generator) for _ in range(3))
    return q, k, v, strided(case, max(case.cached, 1), generator)


def run(case: Case, tensors: tuple[Tensor, ...], kernel: int) -> tuple[Tensor, Tensor]:
    """Launch into guarded, poisoned outputs: [B, S, H, D] and a second one with heads reversed."""
    q, k, v, cache = tensors
    heads = len(case.source)
    wholes = [
        torch.full((case.batch, case.seq_len + 4, heads + 2, case.head_dim), GUARD,
                   dtype=case.dtype, device="cuda")
        for _ in range(2)
    ]  # fmt: skip
    out, second = (whole[:, 2:-2, 1:-1] for whole in wholes)
    out.fill_(torch.nan)
    second.fill_(torch.nan)
    launch(
        q, k, v, out, tasks_of(case.half_windows, case.source, range(heads)[::-1]),
        cache=cache, second=second, kernel=kernel, **case.layout,
    )  # fmt: skip
    for whole, inside in zip(wholes, (out, second), strict=True):
        assert not inside.isnan().any(), "an element was not written, or read from outside"
        around = whole.clone()
        around[:, 2:-2, 1:-1] = GUARD
        assert (around == GUARD).all(), "an element outside the output was written"
    return out, second


def check(case: Case, tensors: tuple[Tensor, ...], out: Tensor) -> None:
    """Computed heads at most twice as far from fp32 as plain SDPA; cached heads bit for bit."""
    q, k, v, cache = tensors
    layout = {**case.layout, "half_windows": case.half_windows}
    truth = reference.arrow_attention(q.float(), k.float(), v.float(), **layout)
    plain = sdpa.arrow_attention(q, k, v, **layout)
    computed = len(case.half_windows)
    for head, index in enumerate(case.source):
        if index >= computed:
            assert torch.equal(out[:, :, head], cache[:, :, index - computed])
            continue
        size = truth[:, :, index].norm()
        error = (out[:, :, head].float() - truth[:, :, index]).norm() / size
        plain_error = (plain[:, :, index].float() - truth[:, :, index]).norm() / size
        # The floor is a tenth of what rounding the output to bf16 alone costs.
        assert error <= 2 * plain_error + 1e-4, (head, float(error), float(plain_error))
