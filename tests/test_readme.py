"""What the README says must exist: files, make targets, verbs, and its Python must parse."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from trt_runtime.cli import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """Lines of shell blocks, continued ones joined, without comments."""
    whole = [block.replace("\\\n", " ") for block in blocks("sh")]
    lines = [line.split("#")[0].strip() for block in whole for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    dry = subprocess.run(
        ["make", "--dry-run", "--assume-new=pyproject.toml", *shlex.split(command)[1:]],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("arrowhead ")])
def test_commands_parse(command: str) -> None:
    parser().parse_args(shlex.split(command)[1:])


def test_verbs_of_the_table_exist(capsys: pytest.CaptureFixture[str]) -> None:
    named = re.findall(r"^\| `arrowhead ([a-z0-9 ]+)`", README, flags=re.MULTILINE)
    assert len(named) >= 9
    for words in named:
        with pytest.raises(SystemExit) as stopped:
            parser().parse_args([*words.split(), "--help"])
        assert stopped.value.code == 0
    capsys.readouterr()


def test_files_of_the_map_exist() -> None:
    table = README.split("## Files")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert rows
    for row in rows:
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            if "/" not in name:
                name = f"{folder}/{name}"
            folder = name.rsplit("/", 1)[0]
            assert list(ROOT.glob(name.rstrip("/"))), name


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("code", blocks("python"))
def test_python_parses_and_names_exist(code: str) -> None:
    import trt_runtime

    compile(code, "README.md", "exec")
    for name in re.findall(r"trt_runtime\.([a-z_]+)\(", code):
        assert name in trt_runtime.__all__
