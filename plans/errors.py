"""The one error every user meets, and the one way a file is written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


class ArrowheadError(ValueError):
    """A user's input does not fit; says what was wrong with what, and how to mend it."""

    def __init__(self, subject: str, *, got: object, expected: object, fix: str) -> None:
        super().__init__(f"{subject} | got {got}; expected {expected}. Fix: {fix}")
        self.subject = subject
        self.got = got
        self.expected = expected
        self.fix = fix


def atomic_write(path: Path, data: str | bytes | memoryview) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        # mkstemp makes the file private; a plan or bundle is as readable as any other output.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
