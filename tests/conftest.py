"""Shared by all tests: one thread, no colours, and skips that `AIGC_REQUIRE=all` turns into failures."""
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_COLOR", "1")
REPO = Path(__file__).resolve().parents[1]


def missing(what: str):
    "Skip because a component is missing; where everything is required (AIGC_REQUIRE=all), fail."
    if os.environ.get("AIGC_REQUIRE") == "all": pytest.fail(f"missing: {what}", pytrace=False)
    pytest.skip(f"missing: {what}")


@pytest.fixture
def repo() -> Path: return REPO


@pytest.fixture
def sample():
    "A file of the folder `shared/data` beside the checkout, or a visible skip."
    def find(name: str) -> Path:
        path = REPO.parent/"shared"/"data"/name
        if not path.exists(): missing(f"the sample data {name}")
        return path
    return find
