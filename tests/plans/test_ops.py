from __future__ import annotations

import pytest
import torch

from plans import ops, reference

CASES = [
    dict(
        shape=(2, 13, 3, 8), scale=0.3, text_tokens=3, text_first=True, block=4, windows=[-1, 0, 1]
    ),
    dict(shape=(1, 10, 1, 4), scale=0.5, text_tokens=0, text_first=False, block=3, windows=[1]),
    dict(shape=(1, 7, 2, 4), scale=1.0, text_tokens=2, text_first=False, block=1, windows=[-1, -1]),
]


def tensors(case: dict, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(case["shape"], dtype=dtype) for _ in range(3)]


def attributes(case: dict) -> tuple:
    return (
        case["scale"],
        case["text_tokens"],
        case["text_first"],
        case["block"],
        case["windows"],
    )


@pytest.mark.parametrize("case", CASES)
def test_arrow_attention_is_the_reference(case: dict) -> None:
    q, k, v = tensors(case)
    keys = ("scale", "text_tokens", "text_first", "block")
    want = reference.arrow_attention(
        q, k, v, half_windows=case["windows"], **{key: case[key] for key in keys}
    )
    got = torch.ops.arrowhead.arrow_attention(q, k, v, *attributes(case))
    assert torch.equal(got, want)


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: dict) -> None:
    """Schema, fake implementation and dispatch agree, as torch itself checks them."""
    checks = ("test_schema", "test_faketensor")
    q, k, v = tensors(case, torch.float16)
    torch.library.opcheck(ops.arrow_attention, (q, k, v, *attributes(case)), test_utils=checks)
    cache = torch.randn_like(q)
    heads = 2 * q.shape[2]
    arguments = (q, k, v, cache, *attributes(case), list(reversed(range(heads))))
    torch.library.opcheck(ops.cached_head, arguments, test_utils=checks)


def test_export_keeps_the_ops_whole() -> None:
    class Merge(torch.nn.Module):
        def forward(self, q, k, v, cache):
            out = ops.arrow_attention(q, k, v, 0.5, 2, True, 4, [0, -1])
            return ops.cached_head(out, k, v, cache, 0.5, 2, True, 4, [0, -1], [2, 0, 1])

    x = [torch.randn(1, 14, heads, 4) for heads in (2, 2, 2, 1)]
    program = torch.export.export(Merge(), tuple(x))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["arrowhead.arrow_attention.default", "arrowhead.cached_head.default"]
    torch.testing.assert_close(program.module()(*x), Merge()(*x))
