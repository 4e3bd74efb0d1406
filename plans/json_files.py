"""JSON files with a format id and a schema: read, checked, written for people to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError

_LINE = 160


def check_format(data: Any, format_id: str, schema_file: str, subject: str) -> None:
    """Raise ArrowheadError if JSON data is not of the named format or breaks its schema."""
    found = data.get("format") if isinstance(data, Mapping) else None
    if found != format_id:
        raise ArrowheadError(
            f"{subject}, format",
            got=found,
            expected=format_id,
            fix="give a file written by this version of Arrowhead",
        )
    import jsonschema

    validator = jsonschema.Draft202012Validator(_schema(schema_file))
    error = jsonschema.exceptions.best_match(validator.iter_errors(data))
    if error is not None:
        where = "/".join(str(part) for part in error.absolute_path) or "top level"
        got = error.message if len(error.message) <= 200 else error.message[:200] + "…"
        raise ArrowheadError(
            f"{subject}, {where}",
            got=got,
            expected=f"JSON that fits {schema_file}",
            fix="mend that entry or write the file anew",
        )


@cache
def _schema(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "schema" / name).read_text())


def read_json(path: Path, subject: str) -> Any:
    """Read a JSON file; raise ArrowheadError if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise ArrowheadError(
            subject, got=error.strerror, expected="a readable file", fix="check the path"
        ) from error
    except ValueError as error:
        raise ArrowheadError(
            subject,
            got=f"malformed JSON ({error})",
            expected="a JSON file",
            fix="restore the file; pickles of the reference need `arrowhead plan import`",
        ) from error


def dump_json(data: Any) -> str:
    """Format JSON with lists of plain values, and objects that fit, on one line each."""
    return _dump(data, "") + "\n"


def _dump(value: Any, indent: str) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, Mapping | list | tuple) or not value:
        return flat
    items = value.values() if isinstance(value, Mapping) else value
    if not any(isinstance(item, Mapping | list | tuple) for item in items):
        if not isinstance(value, Mapping) or len(indent) + len(flat) <= _LINE:
            return flat
    inner = indent + "  "
    if isinstance(value, Mapping):
        lines = [f"{inner}{json.dumps(str(k))}: {_dump(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _dump(v, inner) for v in value) + f"\n{indent}]"
