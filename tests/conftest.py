"""Fixtures shared by all rooms."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a hub; errors come at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

USERS_CACHE = os.environ.get("TUNELAB_CACHE")
os.environ["TUNELAB_CACHE"] = tempfile.mkdtemp(prefix="tunelab-test-cache-")  # fixtures of any scope, and subprocesses
atexit.register(shutil.rmtree, os.environ["TUNELAB_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _users_cache(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Only tests of the real weights use the user's cache."""
    if request.node.get_closest_marker("weights") is None:
        return
    if USERS_CACHE is None:
        monkeypatch.delenv("TUNELAB_CACHE")
    else:
        monkeypatch.setenv("TUNELAB_CACHE", USERS_CACHE)


@pytest.fixture
def hh_rlhf() -> Path:
    """The real hh-rlhf files beside the checkout; a test that needs them skips where they are missing."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh-rlhf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder
