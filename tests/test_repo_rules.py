"""Rules of the repository that no single module can hold: imports, sizes, what lies at the top."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES, COLUMNS = 350, 60, 100
TOP = {
    "pyproject.toml", "exporter", "plugins", "trt_runtime", "plans", "tests", "Makefile",
    "README.md", "LICENSE",
}  # fmt: skip
# These stay importable wherever Python is: a server that only checks a plan needs no PyTorch.
LIGHT = {
    "__init__", "errors", "tiles", "models", "plan", "bundle", "accounting", "solver", "importer",
    "cache_flow", "carry", "check", "json_files",
}  # fmt: skip


@cache
def files() -> tuple[Path, ...]:
    """Files of the project: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name]
    return tuple(ROOT / name for name in names if (ROOT / name).is_file())


def python_files() -> list[Path]:
    return [path for path in files() if path.suffix == ".py"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether a function imports it when called."""
    tree = ast.parse(path.read_text())
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            yield node.module or "", id(node) in inside


def package_files(package: str) -> list[Path]:
    return [path for path in python_files() if relative(path).startswith(f"{package}/")]


def test_light_plan_modules_import_only_the_standard_library_and_jsonschema() -> None:
    wrong = []
    for path in package_files("plans"):
        if path.stem not in LIGHT:
            continue
        for name, lazy in imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "jsonschema":
                continue
            if top == "plans" and (name == "plans" or name.split(".")[1] in LIGHT):
                continue
            if path.stem == "importer" and top == "torch" and lazy:
                continue
            wrong.append(f"{relative(path)} imports {name}")
    assert not wrong


@pytest.mark.parametrize(
    ("package", "forbidden", "except_for"),
    [
        ("plans", {"exporter", "plugins", "trt_runtime", "onnx", "onnxruntime", "tensorrt"}, ""),
        ("exporter", {"plugins", "trt_runtime", "onnxruntime", "tensorrt"}, ""),
        ("plugins", {"exporter", "trt_runtime", "diffusers", "onnx", "onnxscript"}, ""),
        ("trt_runtime", {"exporter"}, "cli"),
        ("trt_runtime", {"onnx", "onnxscript"}, ""),
        ("plans", {"tests"}, ""),
        ("exporter", {"tests"}, ""),
        ("plugins", {"tests"}, ""),
        ("trt_runtime", {"tests"}, ""),
    ],
)
def test_import_contract(package: str, forbidden: set[str], except_for: str) -> None:
    wrong = [
        f"{relative(path)} imports {name}"
        for path in package_files(package)
        if not (except_for and path.stem.startswith(except_for))
        for name, _ in imports(path)
        if name.split(".")[0] in forbidden
    ]
    assert not wrong


def test_kernels_include_only_cuda_and_the_standard_library() -> None:
    kernels = [path for path in files() if relative(path).startswith("plugins/kernels/")]
    own = {path.name for path in kernels}
    wrong = [
        f"{relative(path)} includes {name}"
        for path in kernels
        for name in re.findall(r'^#include [<"](.+)[>"]', path.read_text(), re.MULTILINE)
        if name not in own and not re.fullmatch(r"cuda\w*\.h|[a-z_]+", name)
    ]
    assert kernels and not wrong


def test_the_command_line_starts_without_pytorch() -> None:
    code = "import sys, trt_runtime.cli as c; c.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_sizes() -> None:
    wrong = []
    for path in files():
        if path.suffix not in (".py", ".cpp", ".cu", ".cuh", ".h"):
            continue
        text = path.read_text()
        lines = text.splitlines()
        if len(lines) > FILE_LINES:
            wrong.append(f"{relative(path)}: {len(lines)} lines")
        wide = [i for i, line in enumerate(lines, 1) if len(line) > COLUMNS]
        if wide:
            wrong.append(f"{relative(path)}:{wide[0]}: wider than {COLUMNS} columns")
        for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    wrong.append(f"{relative(path)}: {node.name} has {length} lines")
    assert not wrong


def test_top_level() -> None:
    names = {relative(path).split("/")[0] for path in files()}
    assert {name for name in names if not name.startswith(".")} <= TOP


def test_no_machine_paths_or_registries() -> None:
    # Put together here, so that this file does not match itself.
    patterns = ["/" + "work/", "/" + "home/[a-z]", "/" + "root/", '": "/' + "tmp/",
                "index" + "-url", "https?://[^ \"]*/" + "simple/"]  # fmt: skip
    pattern = re.compile("|".join(patterns))
    wrong = []
    for path in files():
        if path.suffix in (".safetensors", ".png", ".model", ".bin") or path.name == "LICENSE":
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        wrong += [
            f"{relative(path)}:{i}: {line.strip()[:80]}"
            for i, line in enumerate(text.splitlines(), 1)
            if pattern.search(line)
        ]
    assert not wrong


def test_nothing_is_left_undone() -> None:
    marks = re.compile(r"\b(TO" + "DO|FIX" + r"ME|XX" + r"X)\b")
    wrong = [relative(path) for path in python_files() if marks.search(path.read_text())]
    assert not wrong


def test_public_names_are_no_modules() -> None:
    """A submodule of the same name would take the place of a lazily imported function."""
    import trt_runtime

    for name in trt_runtime.__all__:
        assert not (ROOT / "trt_runtime" / f"{name}.py").exists(), name
        assert callable(getattr(trt_runtime, name)), name
