"""The fused kernels on a GPU, against the fp32 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from plans.errors import ArrowheadError
from plans.tiles import CACHED
from plugins.torch import attention, library
from plugins.torch.attention import launch, tasks_of
from tests.plugins.conftest import NO_LIBRARY
from tests.plugins.gpu_cases import Case, cases, check, inputs, run

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU: the kernels are not run", allow_module_level=True)
if library.find_library() is None:
    pytest.skip(NO_LIBRARY, allow_module_level=True)

HOPPER = torch.cuda.get_device_capability() == (9, 0)
KERNELS = [library.SM90, library.SM90_WIDE, library.MMA_SYNC] if HOPPER else [library.MMA_SYNC]
NAMES = {library.SM90: "sm90", library.SM90_WIDE: "sm90-wide", library.MMA_SYNC: "mma"}
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=NAMES.get)
MIX = Case(
    batch=2, image=1024, text=333, text_first=False, head_dim=64, block=128,
    half_windows=(-1, 1, 3), source=(0, 3, 1, 2, 4), cached=2, dtype=torch.bfloat16, seed=1,
)  # fmt: skip
EDGES = [
    MIX,
    replace(MIX, head_dim=128, text_first=True, text=512),
    replace(MIX, text=0),
    replace(MIX, text=0, block=1, half_windows=(0, 1, 5), head_dim=128),
    replace(MIX, image=0, text=77),
    replace(MIX, image=1, text=0),
    replace(MIX, image=1, text=1, head_dim=128),
    replace(MIX, image=129, text=127, dtype=torch.float16),
    replace(MIX, image=1183, text=65, block=100, head_dim=128, dtype=torch.float16),
    replace(MIX, image=960, text=333, block=192, half_windows=(0, 0, 2)),
]


@every_kernel
@pytest.mark.parametrize("case", EDGES, ids=range(len(EDGES)))
def test_edges(kernel: int, case: Case) -> None:
    tensors = inputs(case)
    out, second = run(case, tensors, kernel)
    check(case, tensors, out)
    assert torch.equal(second.flip(2), out)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("direction", ["climb", "fall", "leap"])
def test_scores_that_change_from_tile_to_tile(
    kernel: int, dtype: torch.dtype, head_dim: int, direction: str
) -> None:
    """Random scores of one size have their maxima early: the running shift is then never moved."""
    case = replace(MIX, head_dim=head_dim, dtype=dtype, image=1920)
    q, k, v, cache = inputs(case)
    size = torch.linspace(0.02, 12, case.seq_len, device="cuda")
    if direction == "fall":
        size = size.flip(0)
    elif direction == "leap":  # one tile far above all before it, in few rows' sight
        size = torch.ones_like(size)
        size[1500:1540] = 40
    k.mul_(size[:, None, None])
    out, second = run(case, (q, k, v, cache), kernel)
    check(case, (q, k, v, cache), out)
    assert torch.equal(second.flip(2), out)


@every_kernel
@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(case=cases())
def test_sweep(kernel: int, case: Case) -> None:
    tensors = inputs(case)
    out, second = run(case, tensors, kernel)
    check(case, tensors, out)
    assert torch.equal(second.flip(2), out)


@every_kernel
@pytest.mark.parametrize("text_first", [False, True])
def test_text_and_image_apart(kernel: int, text_first: bool) -> None:
    case = replace(MIX, text_first=text_first)
    whole = inputs(case)
    expected, _ = run(case, whole, kernel)
    first = case.text if text_first else case.image
    apart = [x.split([first, case.seq_len - first], dim=1) for x in whole]
    text, image = (0, 1) if text_first else (1, 0)
    pairs = [(x[text].contiguous(), x[image].contiguous()) for x in apart]
    out = tuple(x.new_empty(x.shape[0], x.shape[1], 5, 64) for x in pairs[0])
    tasks = tasks_of(case.half_windows, case.source)
    launch(*pairs[:3], out, tasks, cache=pairs[3], kernel=kernel, **case.layout)
    parts = expected.split([first, case.seq_len - first], dim=1)
    assert torch.equal(out[0], parts[text])
    assert torch.equal(out[1], parts[image])

    image_only = torch.full_like(out[1], torch.nan)
    launch(*pairs[:3], (None, image_only), tasks, cache=pairs[3], kernel=kernel, **case.layout)
    assert torch.equal(image_only, out[1])


@every_kernel
def test_tasks_in_device_memory_and_heads_left_in_place(kernel: int) -> None:
    tensors = inputs(MIX)
    expected, _ = run(MIX, tensors, kernel)
    computed = len(MIX.half_windows)
    rows = [
        [mode, i - computed if mode == CACHED else i, -1]
        for mode, i in zip(MIX.modes(), MIX.source, strict=True)
    ]
    rows[1][1] = -1  # this cached head already lies in the output
    tasks = torch.tensor(rows, dtype=torch.int32, device="cuda")
    out = torch.full_like(expected, torch.nan)
    out[:, :, 1] = expected[:, :, 1]
    launch(*tensors[:3], out, tasks, cache=tensors[3], kernel=kernel, **MIX.layout)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "case",
    [replace(MIX, source=(4, 3, 3)), replace(MIX, source=(3,), text=0, image=1),
     replace(MIX, source=(4,), image=0, text=77, dtype=torch.float16),
     replace(MIX, source=tuple(range(3, 43)) * 3, cached=40, head_dim=128, image=1023)],
    ids=range(4),
)  # fmt: skip
def test_cached_heads_alone(case: Case) -> None:
    tensors = inputs(case)
    out, second = run(case, tensors, library.AUTO)
    check(case, tensors, out)
    assert torch.equal(second.flip(2), out)


@pytest.mark.parametrize("text_first", [False, True])
def test_cached_heads_alone_without_text_and_one_in_place(text_first: bool) -> None:
    case = replace(MIX, text_first=text_first)
    cache = inputs(case)[3]
    rows = slice(case.text, None) if text_first else slice(case.image)
    out = torch.full((2, case.image, 3, 64), torch.nan, dtype=case.dtype, device="cuda")
    out[:, :, 1] = 7.0
    tasks = (library.HeadTask * library.MAX_HEADS)()
    tasks[:3] = [library.HeadTask(CACHED, source, -1) for source in (1, -1, 0)]
    parts = cache.split([case.text, case.image] if text_first else [case.image, case.text], dim=1)
    pair = parts if text_first else parts[::-1]  # text, image
    launch(pair, pair, pair, (None, out), tasks, cache=pair, **case.layout)
    assert torch.equal(out[:, :, [0, 2]], cache[:, rows].flip(2)) and (out[:, :, 1] == 7.0).all()


@every_kernel
@pytest.mark.parametrize("head_dim", [64, 128])
def test_same_bits_every_time(kernel: int, head_dim: int) -> None:
    case = replace(MIX, head_dim=head_dim, image=4096)
    tensors = inputs(case)
    first, _ = run(case, tensors, kernel)
    assert all(torch.equal(run(case, tensors, kernel)[0], first) for _ in range(100))


@every_kernel
def test_capture_and_replay(kernel: int) -> None:
    q, k, v, cache = inputs(MIX)
    out = torch.empty(2, MIX.seq_len, 5, 64, dtype=MIX.dtype, device="cuda")
    graph = torch.cuda.CUDAGraph()
    tasks = tasks_of(MIX.half_windows, MIX.source)
    with torch.cuda.graph(graph):
        launch(q, k, v, out, tasks, cache=cache, kernel=kernel, **MIX.layout)
    for seed in range(3):
        for x, new in zip((q, k, v, cache), inputs(replace(MIX, seed=seed)), strict=True):
            x.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        check(MIX, (q, k, v, cache), out)


@every_kernel
def test_two_streams_at_once(kernel: int) -> None:
    case = replace(MIX, image=4096)
    tensors = [inputs(replace(case, seed=seed)) for seed in range(2)]
    expected = [run(case, x, kernel)[0] for x in tensors]
    outs = [[torch.empty_like(e) for _ in range(20)] for e in expected]
    streams = [torch.cuda.Stream() for _ in range(2)]
    tasks = tasks_of(case.half_windows, case.source)
    torch.cuda.synchronize()
    for i in range(20):
        for stream, (q, k, v, cache), out in zip(streams, tensors, outs, strict=True):
            with torch.cuda.stream(stream):
                launch(q, k, v, out[i], tasks, cache=cache, kernel=kernel, **case.layout)
    torch.cuda.synchronize()
    assert all(torch.equal(o, e) for e, out in zip(expected, outs, strict=True) for o in out)


@every_kernel
@pytest.mark.slow
def test_more_elements_than_32_bits_count(kernel: int) -> None:
    shape = (8, 16384 + 512, 128, 128)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out = torch.full_like(q, torch.nan)
    layout = {"scale": 128**-0.5, "text_tokens": 512, "text_first": True, "block": 128}
    launch(q, k, v, out, tasks_of([0] * 128), kernel=kernel, **layout)
    assert not any(part.isnan().any() for part in out)
    last = tuple(x[-1:, :, -1:] for x in (q, k, v))
    case = replace(
        MIX, batch=1, image=16384, text=512, text_first=True, head_dim=128, half_windows=(0,),
        source=(0,), cached=0,
    )  # fmt: skip
    check(case, (*last, last[0]), out[-1:, :, -1:])


def test_operators() -> None:
    """torch.ops.arrowhead.*, eager and compiled, take the kernel."""
    attention.register()
    q, k, v, cache = inputs(MIX)
    layout = (MIX.head_dim**-0.5, MIX.text, MIX.text_first, MIX.block)

    def merged(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
        return torch.ops.arrowhead.cached_head(
            q, k, v, cache, *layout, list(MIX.half_windows), list(MIX.source)
        )

    expected, _ = run(MIX, (q, k, v, cache), library.AUTO)
    assert torch.equal(merged(q, k, v, cache), expected)
    assert torch.equal(torch.compile(merged, fullgraph=True)(q, k, v, cache), expected)
    plain = torch.ops.arrowhead.arrow_attention(q, k, v, *layout, list(MIX.half_windows))
    assert torch.equal(plain[:, :, 0], expected[:, :, 0])
    # Rows that no copy engine can load are copied first.
    odd = torch.randn(2, MIX.seq_len, 3, 65, dtype=MIX.dtype, device="cuda")[..., 1:]
    copied = torch.ops.arrowhead.arrow_attention(odd, k, v, *layout, list(MIX.half_windows))
    again = torch.ops.arrowhead.arrow_attention(
        odd.contiguous(), k, v, *layout, list(MIX.half_windows)
    )
    assert torch.equal(copied, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"half_windows": (-3, 0, 0)}, "invalid argument"), ({"source": (9,)}, "invalid argument"),
     ({"block": 0}, "invalid argument")],
)  # fmt: skip
def test_contradictions_are_refused(change: dict[str, object], message: str) -> None:
    case = replace(MIX, **change)
    q, k, v, cache = inputs(MIX)
    out = torch.empty(2, MIX.seq_len, len(case.source), 64, dtype=MIX.dtype, device="cuda")
    with pytest.raises(ArrowheadError, match=message):
        launch(q, k, v, out, tasks_of(case.half_windows, case.source), cache=cache, **case.layout)


def test_misaligned_rows_are_refused() -> None:
    q, k, v, _ = inputs(MIX)
    out = torch.empty(2, MIX.seq_len, 3, 65, dtype=MIX.dtype, device="cuda")[..., 1:]
    with pytest.raises(ArrowheadError, match="misaligned"):
        launch(q, k, v, out, tasks_of(MIX.half_windows), **MIX.layout)
