# SPDX-License-Identifier: MIT
import json
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


@pytest.fixture
def characters() -> str:
    """A tokenizer.json with one token for each of the 95 printable characters."""
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {chr(32 + i): i for i in range(95)}, "unk_token": " "}})
