"""Which of the trained pipelines the tests have."""

from __future__ import annotations

import pytest

from tests.testbed import models


def require(name: str) -> None:
    """Skip the test if the pipeline `name` is not saved, saying how it is made."""
    if why := models.missing(name):
        pytest.skip(why)
