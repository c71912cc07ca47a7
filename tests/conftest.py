# SPDX-License-Identifier: MIT
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
settings.register_profile("default", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The trained checkpoint that the repository carries."""
    return ROOT / "examples" / "tiny-olmoe"
