from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter import export_bundle
from tests.tiny import random_plan, tiny_flux, tiny_sd3, with_first_arrows, with_modes

BATCH = 2


class Exported:
    """One tiny model's bundle, with what it was made from."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.plan = with_first_arrows(random_plan(model, seed=3, buckets=3, steps=6))
        # Runs of heads, lone heads and a whole module from the cache, in one bucket.
        first, last = self.plan.modules[0].name, self.plan.modules[-1].name
        self.plan = with_modes(self.plan, {last: (-2, 0, -2, -1)})
        # All heads of the first module in one cache group.
        self.plan = with_modes(self.plan, {first: (-2,) * 4}, bucket=2)
        self.before = {n: id(m) for n, m in model.named_modules()}
        self.bundle = export_bundle(model, self.plan, folder, dtype="float32", batch=BATCH)


@pytest.fixture(scope="session", params=["sd3", "flux"])
def exported(request: Any, tmp_path_factory: Any) -> Exported:
    model = tiny_sd3(num_layers=2) if request.param == "sd3" else tiny_flux()
    return Exported(model, tmp_path_factory.mktemp("export") / request.param)
