"""The verb plan, end to end on files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plans import importance, search, tables
from plans.plan import Plan, load_plan, save_plan
from tests import tiny
from tests.trt_runtime.conftest import Made
from trt_runtime import cli_search
from trt_runtime.cli import main, parser


@pytest.fixture(scope="module")
def plan() -> Plan:
    return tiny.random_plan(tiny.tiny_sd3())


@pytest.fixture
def plan_file(tmp_path: Path, plan: Plan) -> Path:
    save_plan(plan, tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_show_prints_modes_and_savings(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = plan_file.with_name("plan.png")
    assert main(["plan", "show", str(plan_file), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "transformer_blocks.0.attn2" in out
    assert "attention saved" in out
    assert picture.stat().st_size > 1000


def test_show_says_what_a_search_stands_on(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = {"device": "a GPU", "kernel": "0123", "dense_ms": 100.0, "saved_ms": 37.5}
    record = {"delta": 0.2, "basis": "predicted", "seconds": 3.0, "prices": prices,
              "errors": {plan.modules[0].name: [0.1, 0.15]}}  # fmt: skip
    save_plan(replace(plan, search=record), tmp_path / "plan.json")
    assert main(["plan", "show", str(tmp_path / "plan.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "largest predicted error of a step and module 0.15" in out
    assert "as priced on a GPU: 62.5 of 100.0 ms" in out


def test_check_and_edit_and_diff(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited = plan_file.with_name("edited.json")
    assert main(["plan", "check", str(plan_file)]) == 0
    change = "transformer_blocks.*.attn:all=full"
    assert main(["plan", "edit", str(plan_file), "--bucket", "1", "--set", change,
                 "--output", str(edited)]) == 0  # fmt: skip
    assert load_plan(edited).accounting is not None
    assert main(["plan", "diff", str(plan_file), str(edited)]) == 1
    out = capsys.readouterr().out
    assert "cached -> full" in out and "attention saved: " in out
    assert main(["plan", "diff", str(edited), str(edited)]) == 0


def test_an_illegal_edit_leaves_the_file_alone(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = plan_file.read_bytes()
    edit = ["plan", "edit", str(plan_file), "--bucket", "0", "--set", "*:0=cached"]
    assert main(edit) == 2
    error = capsys.readouterr().err
    assert error.startswith("arrowhead: plan step 0")
    assert error.count("\n") == 1
    assert plan_file.read_bytes() == before


def test_errors_are_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(tmp_path / "absent.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("arrowhead: plan file")
    assert "Traceback" not in error


def test_search_names_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "no-model")
    assert main(["plan", "search", "--model", absent, "--output", str(tmp_path / "p.json")]) == 2
    assert f"model {absent} | got" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "search", "--model", "any", "--output", str(tmp_path / "plan.json")]
    assert main([*arguments, "--device", "cuda"]) == 2
    assert "device cuda | got no GPU" in capsys.readouterr().err


def test_every_verb_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = ["export", "build", "run", "bench", "verify", "inspect", "doctor"]
    actions = [
        ["plan", a]
        for a in (
            "search",
            "buckets",
            "carry",
            "measure",
            "show",
            "diff",
            "edit",
            "import",
            "check",
        )  # fmt: skip
    ]
    for words in [[verb] for verb in verbs] + actions:
        with pytest.raises(SystemExit):
            parser().parse_args([*words, "--help"])
        assert f"examples:\n  arrowhead {' '.join(words)}" in capsys.readouterr().out


def sampling(folder: Path) -> list[str]:
    return ["--model", str(folder.parent / "model"), "--height", "64", "--width", "96",
            "--num-inference-steps", "6", "--guidance-scale", "4", "--block", "5"]  # fmt: skip


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_search_writes_a_plan_that_fits_its_model(
    kind: str,
    torch_bundle: Callable[[str], Made],
    prompts_without_encoders: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _, _ = torch_bundle(kind)
    target = tmp_path / "found" / "plan.json"
    command = ["plan", "search", *sampling(folder), "--prompt", "a cat", "--delta", "0.5",
               "--divisors", "2", "4", "--max-buckets", "3", "--output", str(target)]  # fmt: skip
    assert main(command) == 0
    assert "largest measured error" in capsys.readouterr().out
    assert target.with_suffix(".png").stat().st_size > 1000
    plan = load_plan(target)
    assert plan.search is not None
    assert plan.search["delta"] == 0.5
    assert not Path(str(plan.model.source)).is_absolute()
    model = str(folder.parent / "model")
    assert main(["plan", "check", str(target), "--model", model]) == 0
    assert f"fits {model}" in capsys.readouterr().out


def test_error_weights_are_searched_with_kept_and_measured(
    torch_bundle: Callable[[str], Made],
    prompts_without_encoders: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tuple(importance.ERROR_WEIGHTS) == cli_search.ERROR_WEIGHTS
    assert (tables.FIRST_STEPS, search.DIVISORS) == (cli_search.FIRST_STEPS, cli_search.DIVISORS)
    folder, _, _ = torch_bundle("flux")
    target = tmp_path / "plan.json"
    command = ["plan", "search", *sampling(folder), "--prompt", "a cat", "--delta", "0.5",
               "--divisors", "2", "4", "--max-buckets", "3", "--output", str(target),
               "--error-weights", "stream-dt"]  # fmt: skip
    assert main(command) == 0
    assert "(weights: stream-dt)" in capsys.readouterr().out
    found = load_plan(target).search
    assert found is not None and found["error_weights"] == "stream-dt"
    for more, weights in (([], "stream-dt"), (["--error-weights", "output"], "output")):
        assert main(["plan", "measure", str(target), "--prompt", "a cat", *more]) == 0
        record = load_plan(target).search
        assert record is not None and record["error_weights"] == weights
        assert (record["errors"] == found["errors"]) == (weights == "stream-dt")


def test_search_keeps_its_tables_and_buckets_are_compared(
    torch_bundle: Callable[[str], Made],
    prompts_without_encoders: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, _, _ = torch_bundle("flux")
    tables, target = tmp_path / "kept" / "tables.npz", tmp_path / "plan.json"
    command = ["plan", "search", *sampling(folder), "--prompt", "a cat", "--prompt", "a dog",
               "--delta", "0.5", "--divisors", "2", "4", "--max-buckets", "3", "--resume",
               "--prompts-per-run", "1", "--rounds", "2", "--no-final-check",
               "--sample-tokens", "16", "--tables", str(tables),
               "--output", str(target)]  # fmt: skip
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "memory beside the model" in out and "attention of plans: reference" in out
    plan = load_plan(target)
    assert plan.search is not None and plan.search["sample_tokens"] == 16
    assert f"largest {plan.search['basis']} error" in out
    assert not list((tmp_path / "cache").rglob("*.npz"))
    report = tmp_path / "buckets.json"
    more = ["--delta", "0.5", "--max-buckets", "1", "2", "3", "--json", str(report)]
    assert main(["plan", "buckets", str(tables), *more]) == 0
    out = capsys.readouterr().out
    assert "first step full: predicted" in out and "first step arrow: predicted" in out
    full, arrow = json.loads(report.read_text())["curves"]
    assert (full["first_step"], arrow["first_step"]) == ("full", "arrow")
    for curve in (full, arrow):
        saved = [row["saved"] for row in curve["rows"]]
        assert saved == sorted(saved) and saved[-1] <= curve["bound"] + 1e-9
    assert full["rows"][0]["saved"] == 0 and full["rows"][0]["loss"] == pytest.approx(1)
    assert arrow["rows"][0]["saved"] > 0 and arrow["bound"] >= full["bound"]
    alone = [*more, "--first-step", "full"]
    assert main(["plan", "buckets", str(tables), *alone]) == 0
    assert "first step arrow" not in capsys.readouterr().out
    assert [c["first_step"] for c in json.loads(report.read_text())["curves"]] == ["full"]


def test_an_interrupted_search_says_how_to_go_on(
    torch_bundle: Callable[[str], Made],
    prompts_without_encoders: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from plans import search

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "search_plan", cut)
    folder, _, _ = torch_bundle("flux")
    command = ["plan", "search", *sampling(folder), "--output", str(tmp_path / "plan.json")]
    assert main(command) == 130
    assert "--resume" in capsys.readouterr().out


def test_offload_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "search", "--model", "any", "--offload", "model", "--output"]
    assert main([*command, str(tmp_path / "plan.json")]) == 2
    assert "--offload | got model with device cpu" in capsys.readouterr().err


def test_import_translates_the_references_pickles(
    torch_bundle: Callable[[str], Made],
    prompts_without_encoders: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _, plan = torch_bundle("flux")
    layers = [module.name for module in plan.modules]
    full = torch.full((4, 2), -1, dtype=torch.int32)
    some_cached = full.clone()
    some_cached[[0, 2]] = 0
    windows = {step: some_cached if step % 2 else full for step in range(6)}
    options = dict.fromkeys(layers, windows)
    shares = {layer: {step: [0, 2] if step % 2 else [] for step in range(6)} for layer in layers}
    for name, table in (("options.pkl", options), ("shares.pkl", shares)):
        torch.save(table, tmp_path / name)
    files = [str(tmp_path / "options.pkl"), str(tmp_path / "shares.pkl")]
    target = tmp_path / "plan.json"
    assert main(["plan", "import", *files, *sampling(folder), "--output", str(target)]) == 0
    imported = load_plan(target)
    assert imported.schedule == (0, 1, 0, 1, 0, 1)
    assert imported.modes_at(1)[plan.modules[0].name] == (-2, -1, -2, -1)
    assert imported.sampler.sigmas == pytest.approx(plan.sampler.sigmas)
    capsys.readouterr()
    assert main(["plan", "diff", str(target), str(target)]) == 0


def test_edits_of_steps_leave_the_other_steps_alone(
    plan: Plan, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = plan_file.with_name("edited.json")
    command = ["plan", "edit", str(plan_file), "--output", str(edited), "--set", "*:all=full"]
    assert main([*command, "--steps", "1,3"]) == 0
    assert "plan measure" in capsys.readouterr().out
    found = load_plan(edited)
    full = found.modes_at(0)
    for step in range(plan.steps):
        assert found.modes_at(step) == (full if step in (1, 3) else plan.modes_at(step))
    assert main([*command, "--steps", "9"]) == 2
    assert "--steps | got 9; expected some of 0..5" in capsys.readouterr().err
    assert main([*command, "--steps", "x"]) == 2
    assert main([*command, "--bucket", "1", "2"]) == 0
    assert load_plan(edited).modes_at(1) == full


def test_wide_plans_are_shown_by_count(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = 24
    modules = tuple(replace(m, heads=heads) for m in plan.modules)
    buckets = tuple(replace(b, modes={n: m * 6 for n, m in b.modes.items()}) for b in plan.buckets)
    save_plan(replace(plan, modules=modules, buckets=buckets), tmp_path / "plan.json")
    assert main(["plan", "show", str(tmp_path / "plan.json")]) == 0
    assert "24F" in capsys.readouterr().out
    assert main(["plan", "show", str(tmp_path / "plan.json"), "--heads"]) == 0
    out = capsys.readouterr().out
    assert "24F" not in out and "nothing was measured of this plan" in out


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_carry_and_measure(
    kind: str,
    torch_bundle: Callable[[str], Made],
    prompts_without_encoders: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _, plan = torch_bundle(kind)
    model = str(folder.parent / "model")
    searched, carried = tmp_path / "plan.json", tmp_path / "carried" / "plan.json"
    # The plan's source is beside the bundle; its config is that of the saved model.
    save_plan(replace(plan, model=replace(plan.model, source=model)), searched)
    command = ["plan", "carry", str(searched), "--output", str(carried)]
    assert main([*command, "--num-inference-steps", "9", "--height", "128"]) == 0
    out = capsys.readouterr().out
    assert f"carried from plan {plan.sha256[:12]}, 6 steps at 64 x 96" in " ".join(out.split())
    assert "errors not measured yet" in out
    found = load_plan(carried)
    assert (found.steps, found.height, found.width, found.block) == (9, 128, 96, plan.block)
    assert found.search is not None and found.search["basis"] == "carried"
    assert main(["plan", "check", str(carried), "--model", model]) == 0
    assert main(["plan", "diff", str(searched), str(carried)]) == 1
    assert "steps: 6 -> 9" in capsys.readouterr().out

    assert main(["plan", "measure", str(carried), "--prompt", "a cat"]) == 0
    assert "largest measured error of a step and module" in " ".join(
        capsys.readouterr().out.split()
    )
    assert load_plan(carried).schedule == found.schedule
    repair = ["--repair", "--delta", "0.3", "--prompt", "a cat", "--prompts-per-run", "1"]
    assert main([*command, "--num-inference-steps", "4", *repair]) == 0
    record = load_plan(carried).search
    assert record is not None and record["basis"] == "measured" and record["delta"] == 0.3
    assert max(max(row) for row in record["errors"].values()) <= 0.3

    assert main([*command, "--num-inference-steps", "0"]) == 2
    assert "--num-inference-steps | got 0" in capsys.readouterr().err
    other = str(torch_bundle("sd3" if kind == "flux" else "flux")[0].parent / "model")
    assert main([*command, "--model", other]) == 2
    assert "transformer class | got" in capsys.readouterr().err
