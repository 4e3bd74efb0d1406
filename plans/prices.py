"""What a head costs in each mode on one device, in milliseconds; measured, kept in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plans.errors import ArrowheadError, atomic_write
from plans.json_files import check_format, dump_json, read_json
from plans.models import AttentionModule
from plans.tiles import CACHED, FULL

FORMAT = "arrowhead.prices/1"


@dataclass(frozen=True)
class Shape:
    """What the time of a module's attention depends on; rows: of the transformer call."""

    rows: int
    heads: int
    head_dim: int
    image_tokens: int
    text_tokens: int
    text_first: bool
    block: int


@dataclass(frozen=True)
class Price:
    """Milliseconds of one head of a module: mode -> attention, and its part of the projections.

    Every mode but CACHED pays the projection. What a launch costs whatever its heads do is in all
    modes alike.
    """

    shape: Shape
    attention: Mapping[int, float]
    projection: float

    def of(self, mode: int) -> float:
        """Return what a head costs in a mode, projections to q, k and v included."""
        return self.attention[mode] + (0.0 if mode == CACHED else self.projection)


@dataclass(frozen=True)
class Prices:
    """Prices of some shapes on one device with one build of the kernel library.

    batch: pictures of the transformer calls that a search is to make cheap.
    """

    device: str
    kernel: str
    prices: tuple[Price, ...]
    batch: int = 1

    def find(self, module: AttentionModule, rows: int) -> Price:
        """Return a module's prices; raise ArrowheadError where its shape was not measured.

        rows: of the transformer call for one picture.
        """
        wanted = shape_of(module, rows * self.batch)
        for price in self.prices:
            if price.shape == wanted:
                return price
        known = "; ".join(_text(price.shape) for price in self.prices) or "nothing"
        raise ArrowheadError(
            f"prices of {module.name}",
            got=known,
            expected=_text(wanted),
            fix="measure them on the device: arrowhead bench attention --price --plan PLAN --batch "
            f"{self.batch}",
        )

    def worthwhile(
        self, module: AttentionModule, rows: int, candidates: Sequence[int]
    ) -> tuple[int, ...]:
        """Leave out modes that are not faster than full here; refuse those that have no price."""
        price = self.find(module, rows)
        missing = [mode for mode in candidates if mode not in price.attention]
        if missing:
            raise ArrowheadError(
                f"prices of {module.name}",
                got=f"half windows {sorted(m for m in price.attention if m >= 0)}",
                expected=f"{missing}, too",
                fix="search with the divisors that prices are measured for: --divisors 8 16 32",
            )
        return tuple(mode for mode in candidates if price.of(mode) < price.of(FULL))

    def savings(
        self, module: AttentionModule, rows: int, candidates: Sequence[int]
    ) -> list[dict[int, float]]:
        """Return per head the milliseconds that each candidate saves."""
        price = self.find(module, rows)
        return [{mode: price.of(FULL) - price.of(mode) for mode in candidates}] * module.heads


def shape_of(module: AttentionModule, rows: int) -> Shape:
    layout = module.layout
    return Shape(
        rows, module.heads, module.head_dim, layout.image_tokens, layout.text_tokens,
        layout.text_first and layout.text_tokens > 0, layout.block,
    )  # fmt: skip


def fit(
    mixes: Sequence[Mapping[int, int]], times: Sequence[float], constant: bool = False
) -> dict[int, float]:
    """Fit time = sum over modes of heads x price, by least squares of relative residuals.

    mixes: mode -> heads. constant: let a part of the time be the same in all mixes, which takes
    mixes of different numbers of heads. Negative prices are taken as 0.
    """
    import numpy as np

    modes = sorted({mode for mix in mixes for mode in mix})
    rows = np.array([[*(mix.get(mode, 0) for mode in modes), float(constant)] for mix in mixes])
    if len(mixes) != len(times) or not all(t > 0 and math.isfinite(t) for t in times):
        raise ArrowheadError(
            "times of the mixes", got=list(times), expected=f"{len(mixes)} positive numbers",
            fix="measure each mix once",
        )  # fmt: skip
    scale = 1 / np.array(times)
    solution = np.linalg.lstsq(rows * scale[:, None], np.ones(len(times)), rcond=None)[0]
    return {mode: max(0.0, float(x)) for mode, x in zip(modes, solution[:-1], strict=True)}


def merged(old: Prices, new: Prices) -> Prices:
    """Add prices to those of the same device and kernels; new ones take the place of old ones."""
    if (old.device, old.kernel) != (new.device, new.kernel):
        return new
    fresh = {price.shape for price in new.prices}
    kept = tuple(price for price in old.prices if price.shape not in fresh)
    return Prices(new.device, new.kernel, kept + new.prices)


def save_prices(prices: Prices, path: Path) -> None:
    """Write the JSON file; parents are made."""
    rows = [
        {
            **asdict(p.shape),
            "projection_ms": p.projection,
            "attention_ms": {str(mode): ms for mode, ms in sorted(p.attention.items())},
        }
        for p in prices.prices
    ]
    data = {
        "format": FORMAT, "device": prices.device, "kernel": prices.kernel, "prices": rows,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, dump_json(data))


def load_prices(path: Path) -> Prices:
    """Read the JSON file; raises ArrowheadError for another kind of file."""
    data = read_json(path, f"prices file {path}")
    check_format(data, FORMAT, "prices-1.schema.json", f"prices file {path}")
    return Prices(data["device"], data["kernel"], tuple(_prices(data["prices"])))


def _prices(rows: Iterable[Mapping[str, Any]]) -> Iterable[Price]:
    for row in rows:
        shape = Shape(**{name: row[name] for name in Shape.__dataclass_fields__})
        attention = {int(mode): float(ms) for mode, ms in row["attention_ms"].items()}
        yield Price(shape, attention, float(row["projection_ms"]))


def _text(shape: Shape) -> str:
    return json.dumps(asdict(shape)).replace('"', "")
