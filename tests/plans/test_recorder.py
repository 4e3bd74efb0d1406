"""Sampled rows tell what all rows would, and runs on parts of the prompts what one on all would."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from plans.models import AttentionModule
from plans.recorder import Recorder, head_savings, pooled_errors
from plans.reference import arrow_attention
from plans.sample import sample_of
from plans.scores import counted, moments, relative_squared_errors
from plans.tables import HeadTables
from plans.tiles import CACHED, FULL, TokenLayout

CPU = torch.device("cpu")


def _qkv(module: AttentionModule, batch: int, generator: torch.Generator) -> list[Tensor]:
    shape = (batch, module.layout.seq_len, module.heads, module.head_dim)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def _outputs(module: AttentionModule, qkv: Sequence[Tensor], modes: Sequence[int]) -> list[Tensor]:
    layout = module.layout
    shape = dict(scale=module.head_dim**-0.5, text_tokens=layout.text_tokens,
                 text_first=layout.text_first, block=layout.block)  # fmt: skip
    return [arrow_attention(*qkv, half_windows=[mode] * module.heads, **shape) for mode in modes]


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(("text_tokens", "text_output"), [(0, True), (7, True), (7, False)])
@pytest.mark.parametrize(
    ("block", "windows", "sampled"),
    [(1, (0, 3), 2048), (16, (0, 2), 2048), (16, (1, 2), 300), (128, (0, 1), 2048), (48, (1,), 1)],
)
def test_a_samples_attention_is_the_references(
    text_first: bool, text_tokens: int, text_output: bool, block: int, windows: tuple[int, ...],
    sampled: int,
) -> None:  # fmt: skip
    layout = TokenLayout(700, text_tokens, text_first, block)
    module = AttentionModule("attn", 3, 8, layout, text_output)
    qkv = _qkv(module, 2, torch.Generator().manual_seed(0))
    sample = sample_of(module, CPU, windows, sampled)
    assert sample.weights.sum().item() == pytest.approx(700 + text_tokens * text_output)
    assert len(sample.rows) == len(sample.rows.unique())
    full, *arrows = (sample.of(x) for x in _outputs(module, qkv, (FULL, *windows)))
    seen = sample.full(*qkv)
    torch.testing.assert_close(seen, full, atol=2e-6, rtol=1e-5)
    found = torch.full((len(windows), *seen.shape), torch.nan)
    sample.arrows(*qkv, seen, found)
    torch.testing.assert_close(found, torch.stack(arrows), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("text_output", [False, True])
def test_records_are_the_errors_of_all_rows_where_they_fit(text_output: bool) -> None:
    module = AttentionModule("attn", 3, 8, TokenLayout(300, 7, True, 16), text_output)
    recorder = Recorder([module], {"attn": (0, 2, CACHED)}, steps=5, ages=2)
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for step in range(5):
        qkv = _qkv(module, 2, generator)
        full, *arrows = _outputs(module, qkv, (FULL, 0, 2))
        recorder.note(step, module, *qkv, recorder.sample(module, CPU).of(full))
        outputs.append((counted(module, full), [counted(module, arrow) for arrow in arrows]))
    run = {**recorder.moments(), "pictures": np.array(2.0)}
    tables = recorder.tables([run], {"attn": head_savings(module, (0, 2, CACHED))})
    assert tables.windows == (0, 2) and tables.heads == (3,)
    for step, (full, arrows_seen) in enumerate(outputs):
        for column, arrow in enumerate(arrows_seen):
            want = relative_squared_errors(arrow, full).numpy()
            np.testing.assert_allclose(tables.arrow[step, :, column], want, rtol=1e-4)
        for age in (1, 2):
            want = np.full(3, np.inf)
            if age <= step:
                want = relative_squared_errors(outputs[step - age][0], full).numpy()
            np.testing.assert_allclose(tables.cached[step, :, age - 1], want, rtol=1e-4)


def test_a_module_that_was_left_out_repeats_its_output() -> None:
    """A step cache left both modules out of step 2, and the later one out of step 3 too."""
    modules = [AttentionModule(n, 2, 8, TokenLayout(90, 7, True, 16), True) for n in "ab"]
    recorder = Recorder(modules, {n: (0, CACHED) for n in "ab"}, steps=5, ages=4)
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, dict[int, Tensor]] = {"a": {}, "b": {}}
    for module, steps in zip(modules, ((0, 1, 3, 4), (0, 1, 4)), strict=True):
        for step in steps:
            qkv = _qkv(module, 1, generator)
            seen[module.name][step] = recorder.sample(module, CPU).full(*qkv)
            recorder.note(step, module, *qkv, seen[module.name][step])
    run = recorder.moments()
    assert run["ran"].tolist() == [1, 1, 0, 0, 1]
    savings = {m.name: head_savings(m, (0, CACHED)) for m in modules}
    tables = recorder.tables([{**run, "pictures": np.array(1.0)}], savings)
    for step, left_out in ((2, slice(0, 4)), (3, slice(2, 4))):
        assert not tables.arrow[step, left_out].any() and not tables.cached[step, left_out].any()
    own = {"a": [3, 1, 1, 0], "b": [1, 1, 1, 0]}  # whose output there is 1 to 4 steps before step 4
    for first, (name, written) in zip((0, 2), own.items(), strict=True):
        for age, before in enumerate(written):
            want = relative_squared_errors(seen[name][before], seen[name][4]).numpy()
            np.testing.assert_allclose(tables.cached[4, first : first + 2, age], want, rtol=1e-4)


def test_a_table_of_some_steps_counts_ages_in_them() -> None:
    rng = np.random.default_rng(0)
    arrow, cached, drift = (rng.random(shape) for shape in ((5, 2, 1), (5, 2, 3), (5, 2)))
    tables = HeadTables((2,), (1,), arrow, cached, np.ones((2, 1)), np.ones(2), drift)
    some = tables.at_steps([0, 1, 4])
    assert np.array_equal(some.arrow, arrow[[0, 1, 4]])
    assert np.array_equal(some.drift, drift[[0, 1, 4]]) and some.weights.shape == (3, 2)
    assert np.array_equal(some.cached[1, :, 0], cached[1, :, 0])
    assert np.array_equal(some.cached[2, :, 0], cached[4, :, 2])  # of step 1, three before
    assert np.isinf(some.cached[2, :, 1:]).all()  # of step 0: older than any that was recorded
    assert np.isinf(some.cached[0]).all() and np.isinf(some.cached[1, :, 1:]).all()


def test_modules_have_their_own_windows() -> None:
    wide = AttentionModule("wide", 2, 8, TokenLayout(300, 7, True, 16), True)
    narrow = AttentionModule("narrow", 1, 8, TokenLayout(90, 0, False, 16), True)
    modes = {"wide": (4, 1), "narrow": (2, CACHED)}
    recorder = Recorder([wide, narrow], modes, steps=1, ages=3)
    generator = torch.Generator().manual_seed(0)
    for module in (wide, narrow):
        qkv = _qkv(module, 1, generator)
        recorder.note(0, module, *qkv, recorder.sample(module, CPU).full(*qkv))
    savings = {m.name: head_savings(m, modes[m.name]) for m in (wide, narrow)}
    tables = recorder.tables([{**recorder.moments(), "pictures": np.array(1.0)}], savings)
    assert tables.windows == (1, 2, 4)
    assert np.isfinite(tables.arrow[0]).tolist() == [[True, False, True]] * 2 + [
        [False, True, False]
    ]
    assert (tables.arrow_saving > 0).tolist() == np.isfinite(tables.arrow[0]).tolist()
    assert tables.cached_saving[:2].tolist() == [0, 0] and tables.cached_saving[2] > 0


def test_a_sample_of_rows_tells_the_error_of_all() -> None:
    module = AttentionModule("attn", 2, 16, TokenLayout(4096, 33, False, 64), True)
    qkv = _qkv(module, 1, torch.Generator().manual_seed(0))
    full, arrow = _outputs(module, qkv, (FULL, 3))
    sample = sample_of(module, CPU, (3,), 1024)
    assert len(sample.rows) == 33 + 1024
    want = relative_squared_errors(arrow, full)
    got = relative_squared_errors(sample.of(arrow), sample.of(full), sample.weights)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0)


def test_runs_of_parts_of_the_prompts_tell_what_one_of_all_does() -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(3, 40, 2, 8, generator=generator) + torch.tensor([0.0, 5.0])[:, None]
    full[2] += 1.0  # the pictures' means differ
    other = full + 0.1 * torch.randn(4, 3, 40, 2, 8, generator=generator)
    other[3] = torch.inf

    def run(part: slice) -> dict[str, np.ndarray]:
        found = moments([other[:1, part], other[1:, part]], full[part])
        arrays = {name: value.numpy().T[None] for name, value in found._asdict().items()}
        return {**arrays, "pictures": np.array(float(len(full[part])))}

    whole = pooled_errors([run(slice(0, 3))])
    parts = pooled_errors([run(slice(0, 2)), run(slice(2, 3))])
    assert whole.shape == (1, 2, 4)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert np.isinf(whole[:, :, 3]).all() and np.isfinite(whole[:, :, :3]).all()


def test_a_2k_picture_is_recorded_in_few_launches_and_little_work() -> None:
    layout = TokenLayout(16384, 512, True, 128)
    sample = sample_of(AttentionModule("attn", 24, 128, layout, True), CPU, (2, 4, 8))
    assert len(sample.rows) == 2048 + 512
    assert len(sample.bands) <= 3  # chunks inside, and at the picture's two edges
    pairs = sum(
        band.keys.shape[0] * band.rows * count
        for band in sample.bands
        for count, _ in band.windows.values()
    )
    assert pairs < 0.045 * layout.seq_len**2
    assert all(mask is None for band in sample.bands for _, mask in band.windows.values())
