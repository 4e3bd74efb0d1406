"""The view of the heads: right on attention that is known, and heads of both pipelines differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from plans.models import AttentionModule
from plans.tiles import TokenLayout
from tests.testbed import attention_maps, models
from tests.testbed.conftest import require
from tests.testbed.evaluate import held_out_captions
from trt_runtime.pipeline import load_source_pipeline

ROWS, COLUMNS, TEXT = 4, 6, 5


@pytest.mark.parametrize("text_first", [False, True])
def test_known_attention(text_first: bool) -> None:
    layout = TokenLayout(ROWS * COLUMNS, TEXT, text_first, block=3)
    weights = torch.zeros(layout.seq_len, layout.seq_len)
    # Four tokens ahead: a row down and two columns to the left, where there is such a place.
    ahead = [(query + 4) % layout.image_tokens for query in range(layout.image_tokens)]
    for query, key in enumerate(ahead):
        weights[layout.image_offset + query, layout.image_offset + key] = 0.75
        weights[layout.image_offset + query, layout.text_offset] = 0.25
    seen = attention_maps.gaze_of(weights, layout, COLUMNS)
    blocks_apart = [abs(query // 3 - key // 3) for query, key in enumerate(ahead)]
    shares = [sum(n <= w for n in blocks_apart) / len(ahead) for w in (1, 2)]
    assert 0 < shares[0] < shares[1] < 1
    assert seen.band == pytest.approx([0.75 * share for share in shares])
    assert seen.text == 0.25
    assert seen.around[ROWS - 1 + 1, COLUMNS - 1 - 2] == pytest.approx(0.75 * layout.seq_len)
    assert seen.around[ROWS - 1 - 1, COLUMNS - 1 + 2] == 0


def test_even_attention_is_one_everywhere() -> None:
    layout = TokenLayout(ROWS * COLUMNS, TEXT, True, block=5)
    weights = torch.full((layout.seq_len, layout.seq_len), 1 / layout.seq_len)
    seen = attention_maps.gaze_of(weights, layout, COLUMNS)
    assert (*seen.band, seen.text) == pytest.approx(attention_maps.even_attention(layout))
    assert seen.around == pytest.approx(1) and seen.whole == pytest.approx(1)


def test_change_is_that_of_the_last_row_since_the_step_before() -> None:
    torch.manual_seed(0)
    layout = TokenLayout(ROWS * COLUMNS, TEXT, False, block=3)
    module = AttentionModule("transformer_blocks.0.attn", 2, 8, layout, True)
    heads = attention_maps.WatchHeads(1, COLUMNS)
    q, k, v = (torch.randn(2, layout.seq_len, 2, 8) for _ in range(3))
    other = v.clone()
    other[0] += 1
    other[1, :, 1] *= 2
    for step, values in enumerate((v, other, v)):
        heads.begin_step(step)
        heads.attend(module, q, k, values)
    out = scaled_dot_product_attention(q[1, :, 1], k[1, :, 1], other[1, :, 1])
    want = (out / 2).square().mean() / out.var(correction=0)
    assert [view.change for view in heads.views] == pytest.approx([0, want.item()])


@pytest.mark.parametrize("name", models.NAMES)
def test_heads_differ(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require(name)
    pipe = load_source_pipeline(str(models.TESTBED / name), dtype=torch.float32)
    views = attention_maps.watch(pipe, held_out_captions(1)[0], 3, 1, 3.0)
    assert len(views) == 4 * (6 if name == "tiny-sd3" else 8)
    near = [view.gaze.band[-1] for view in views]
    assert max(near) > 0.6 and min(near) < 0.1
    assert max(view.gaze.text for view in views) > 0.3
    changes = sorted(view.change for view in views)
    assert changes[-1] > 2 * changes[0] > 0
    chosen = attention_maps.examples(views)
    assert len({id(view) for view in chosen.values()}) == len(chosen)
    attention_maps.draw(views, name, "a caption", tmp_path / "maps.png")
    assert 30_000 < (tmp_path / "maps.png").stat().st_size < 300_000
    Console().print(attention_maps.summary(views))
    assert "on the text" in capsys.readouterr().out
