"""What the operators of a tiny transformer's buckets are called with, as files for the driver.

    python -m tests.plugins.trt_cases FOLDER

writes them for a machine that has a GPU and no diffusers; tests/plugins/test_trt_plugin.py reads
them there from the folder that ARROWHEAD_TRT_CASES names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from plans import ops, reference
from tests.plugins.gpu_cases import Case

RECORDINGS = (("sd3", torch.float16), ("sd3", torch.bfloat16), ("flux", torch.bfloat16))
HEIGHT, WIDTH = 256, 192  # 192 image tokens: two query tiles, and bands that end inside them


@dataclass(frozen=True)
class Call:
    """One call: q, k, v and perhaps the cache, each [B, S, heads, D]."""

    tensors: tuple[Tensor, ...]
    scale: float
    text_tokens: int
    text_first: bool
    block: int
    half_windows: tuple[int, ...]
    source: tuple[int, ...] = ()

    @property
    def case(self) -> Case:
        """The same as a problem of the kernel tests, which know how exact it has to be."""
        q = self.tensors[0]
        return Case(
            batch=q.shape[0],
            image=q.shape[1] - self.text_tokens,
            text=self.text_tokens,
            text_first=self.text_first,
            head_dim=q.shape[3],
            block=self.block,
            half_windows=self.half_windows,
            source=self.source or tuple(range(len(self.half_windows))),
            cached=sum(x.shape[2] for x in self.tensors[3:]),
            dtype=q.dtype,
            seed=0,
        )

    def write(self, folder: Path) -> None:
        """Write case.txt and the tensors as tests/plugins/trt/driver_case.h reads them."""
        folder.mkdir(parents=True)
        lines: dict[str, Sequence[Any]] = {
            "op": ["CachedHead" if self.source else "ArrowAttention"],
            "dtype": [str(self.tensors[0].dtype).removeprefix("torch.")],
            "scale": [self.scale],
            "text_tokens": [self.text_tokens],
            "text_first": [int(self.text_first)],
            "block": [self.block],
            "half_windows": self.half_windows,
            "source": self.source,
        }
        for name, tensor in zip(("q", "k", "v", "cache"), self.tensors, strict=False):
            lines[name] = tensor.shape
            data = tensor.contiguous().view(torch.int16).numpy().tobytes()
            (folder / f"{name}.bin").write_bytes(data)
        text = "".join(f"{name} {' '.join(map(str, values))}\n" for name, values in lines.items())
        (folder / "case.txt").write_text(text)

    @classmethod
    def read(cls, folder: Path) -> Call:
        """Read what `write` wrote."""
        lines = dict(line.split(" ", 1) for line in (folder / "case.txt").read_text().splitlines())
        numbers = {name: tuple(map(float, text.split())) for name, text in lines.items()
                   if name not in ("op", "dtype")}  # fmt: skip
        integers = {name: tuple(map(int, values)) for name, values in numbers.items()}
        dtype = getattr(torch, lines["dtype"])
        names = [name for name in ("q", "k", "v", "cache") if name in integers]
        return cls(
            tuple(_tensor(folder / f"{name}.bin", dtype, integers[name]) for name in names),
            numbers["scale"][0],
            integers["text_tokens"][0],
            bool(integers["text_first"][0]),
            integers["block"][0],
            integers["half_windows"],
            integers["source"],
        )

    def read_output(self, folder: Path) -> Tensor:
        """Give what the driver wrote: [B, S, H, D]."""
        case = self.case
        shape = (case.batch, case.seq_len, len(case.source), case.head_dim)
        return _tensor(folder / "out.bin", case.dtype, shape)


def _tensor(path: Path, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).view(*shape)


def folder_name(kind: str, dtype: torch.dtype) -> str:
    return f"{kind}-{str(dtype).removeprefix('torch.')}"


def write_all(folder: Path, kind: str, dtype: torch.dtype) -> None:
    """Record, and write each call to a numbered folder in `folder`."""
    for i, call in enumerate(record(kind, dtype)):
        call.write(folder / f"{i:02}")


def record(kind: str, dtype: torch.dtype) -> list[Call]:
    """Run every bucket of a random plan once, in order, and note what its operators are given.

    Heads are as wide as in the real models, 64 and 128, but few. The model runs in fp32; dtype is
    that of the noted tensors.
    """
    from tests import tiny  # wants diffusers

    with mock.patch.multiple(tiny, HEIGHT=HEIGHT, WIDTH=WIDTH):
        return _record(tiny, kind, dtype)


def _record(tiny: Any, kind: str, dtype: torch.dtype) -> list[Call]:
    from plans.processors import BucketHeads, install

    if kind == "sd3":
        model = tiny.tiny_sd3(
            attention_head_dim=64,
            caption_projection_dim=64 * tiny.HEADS,
            pos_embed_max_size=16,
        )
    else:
        model = tiny.tiny_flux(attention_head_dim=128, axes_dims_rope=(16, 56, 56))
    plan = tiny.random_plan(model)
    calls: list[Call] = []

    def arrow_attention(q: Tensor, k: Tensor, v: Tensor, *layout: Any) -> Tensor:
        *others, windows = layout
        calls.append(Call(_cast(dtype, q, k, v), *others, tuple(windows)))
        return reference.arrow_attention(q, k, v, **_named(layout))

    def cached_head(
        q: Tensor, k: Tensor, v: Tensor, cache: Tensor, *layout_and_source: Any
    ) -> Tensor:
        *layout, source = layout_and_source
        *others, windows = layout
        calls.append(Call(_cast(dtype, q, k, v, cache), *others, tuple(windows), tuple(source)))
        return reference.cached_head(q, k, v, cache, source=source, **_named(layout))

    caches: dict[str, Tensor] = {}
    for bucket in range(len(plan.buckets)):
        heads = BucketHeads(plan, bucket)
        heads.cache_in = caches
        undo = install(model, plan.modules, heads)
        with (
            torch.no_grad(),
            mock.patch.object(ops, "arrow_attention", arrow_attention),
            mock.patch.object(ops, "cached_head", cached_head),
        ):
            model(**tiny.inputs_of(model, seed=bucket), return_dict=False)
        undo()
        caches |= heads.cache_out
    return calls


def _cast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(dtype) for tensor in tensors)


def _named(layout: Sequence[Any]) -> dict[str, Any]:
    names = ("scale", "text_tokens", "text_first", "block", "half_windows")
    return dict(zip(names, layout, strict=True))


if __name__ == "__main__":
    for recording in RECORDINGS:
        write_all(Path(sys.argv[1]) / folder_name(*recording), *recording)
