from __future__ import annotations

import stat
from pathlib import Path

import pytest

from plans.errors import ArrowheadError, atomic_write


def test_error_says_what_how_and_keeps_its_parts() -> None:
    error = ArrowheadError("block", got=0, expected="at least 1", fix="pass --block 128")
    assert str(error) == "block | got 0; expected at least 1. Fix: pass --block 128"
    assert (error.subject, error.got, error.expected) == ("block", 0, "at least 1")
    assert isinstance(error, ValueError)


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_atomic_write_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    atomic_write(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
