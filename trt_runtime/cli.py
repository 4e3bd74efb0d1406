"""The `arrowhead` command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from plans.errors import ArrowheadError

# In the order of a first use; each module adds its verbs to the parser.
_VERBS = ("cli_plan", "cli_build", "cli_run", "cli_triton", "cli_inspect")

_EPILOG = """\
From a checkpoint to pictures:
  arrowhead plan search --model MODEL --output plan.json
  arrowhead export --plan plan.json --output bundle
  arrowhead build bundle
  arrowhead run bundle --prompt "a red circle above a blue square" --output picture.png

`arrowhead VERB --help` explains each verb by example; `arrowhead doctor` says what this machine
can run.
"""


def parser() -> argparse.ArgumentParser:
    """Make the parser of all verbs."""
    root = argparse.ArgumentParser(
        prog="arrowhead",
        description="Per-head attention plans for text-to-image MMDiTs: search, export, run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    verbs = root.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name in _VERBS:
        importlib.import_module(f"trt_runtime.{name}").add_verbs(verbs)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 is success, 1 a failed check, 2 a user's error."""
    # Before their first import: both libraries warn about parts that pictures do not need.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _check_device(options)
            return options.run(options) or 0
    except ArrowheadError as error:
        if options.debug:
            raise
        print("arrowhead: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except BrokenPipeError:  # as by `arrowhead plan diff .. | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def _check_device(options: argparse.Namespace) -> None:
    """Refuse a GPU that PyTorch does not see, before anything is loaded for it.

    TensorRT has its own say: TensorRT-RTX builds engines where there is no GPU.
    """
    device = getattr(options, "device", "cpu")
    if not device.startswith("cuda") or getattr(options, "backend", None) == "tensorrt":
        return
    import torch

    if not torch.cuda.is_available():
        raise ArrowheadError(
            f"device {device}",
            got=f"no GPU that PyTorch {torch.__version__} can use",
            expected="an NVIDIA GPU, its driver and a CUDA build of PyTorch",
            fix="run without --device, on the CPU; `arrowhead doctor` says what is missing",
        )


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print("warning: " + " ".join(str(message).split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
