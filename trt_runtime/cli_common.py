"""What the verbs of the command line share: arguments, progress bars, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError, atomic_write

Verbs = Any  # argparse's sub-parser registry, which has no public type

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_PROMPTS = (
    "a red circle above a blue square on a grey ground",
    "a photograph of a lighthouse at dusk, waves against the rocks",
    "an astronaut riding a horse through a field of sunflowers",
    "a wooden table with a bowl of oranges and a green bottle",
)


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], help_: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a sub-command whose help shows examples."""
    parser = verbs.add_parser(
        name,
        help=help_,
        description=help_[0].upper() + help_[1:] + ".",
        epilog=f"examples:\n{epilog.rstrip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


class _Backend(argparse.Action):
    """TensorRT runs on GPUs alone, so that it brings its device along."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        namespace.backend = value
        if value == "tensorrt" and namespace.device == "cpu":
            namespace.device = "cuda"


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        action=_Backend,
        default="onnxruntime",
        help="onnxruntime (default) or tensorrt, which run the graphs; torch-compile: PyTorch "
        "under torch.compile, one CUDA graph a bucket (--device cuda; compiles for minutes at its "
        "start); torch: PyTorch uncompiled, which the others are compared with",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads of one operator in ONNX Runtime; 0, the default, is one a core",
    )
    parser.add_argument(
        "--weights",
        choices=("shared", "embedded"),
        default="shared",
        help="one copy for all buckets (default), or one in each, packed: some percent faster",
    )


def session_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give the settings of ONNX Runtime's sessions that add_backend's arguments name."""
    return {"threads": arguments.threads, "weights": arguments.weights}


def add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt; repeat it for more"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="use only the first N of them")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the report as JSON to FILE; with no FILE print it in place of the table",
    )


def prompts_of(arguments: argparse.Namespace, model: str | None = None) -> list[str]:
    """Give --prompt and --prompts; else the model's calibration prompts; else a few of our own."""
    prompts = list(arguments.prompt or [])
    path = arguments.prompts
    if path is None and not prompts and model is not None:
        beside = Path(model) / "calibration_prompts.txt"
        path = beside if beside.is_file() else None
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ArrowheadError(
                f"prompts {path}",
                got=error.strerror,
                expected="a text file, one prompt a line",
                fix="check the path",
            ) from error
        prompts += [line.strip() for line in lines if line.strip()]
    return (prompts or list(_PROMPTS))[: arguments.num_prompts]


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr; call what it gives with (what, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield advance


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on stdout; columns of numbers are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, name in enumerate(header):
        numbers = bool(rows) and all(str(row[i])[:1] in "-0123456789" for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Piped output has no width of its own; a table is wider than rich's 80 columns.
    width = None if sys.stdout.isatty() else 140
    console = Console(width=width, markup=False, highlight=False)
    console.print(title, soft_wrap=True)
    console.print(table)


def write_json(report: Any, target: str) -> None:
    """Write a report to a file, or to stdout for "-"."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        make_parent(Path(target))
        atomic_write(Path(target), text)


def cache_folder() -> Path:
    """Folder for what can be made again: prices of devices, runs of searches."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "arrowhead"


def make_parent(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def bytes_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def dtype_of(name: str) -> str:
    """Turn fp32, fp16, bf16 into the long name bundles use."""
    if name not in DTYPES:
        raise ArrowheadError(
            "--dtype", got=name, expected=f"one of {', '.join(DTYPES)}", fix="pass one of them"
        )
    return DTYPES[name]
