# SPDX-License-Identifier: MIT
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
settings.register_profile("default", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A copy of the trained checkpoint that the repository carries; caches of its barriers lie beside the copy."""
    return Path(shutil.copytree(ROOT / "examples" / "tiny-olmoe", tmp_path_factory.mktemp("source") / "tiny-olmoe"))
