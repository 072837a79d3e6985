"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a hub; errors come at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request) -> None:
    """Nothing is written to the user's cache; only tests of the real weights read from it."""
    if request.node.get_closest_marker("weights") is None:
        monkeypatch.setenv("TUNELAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def hh_rlhf() -> Path:
    """The real hh-rlhf files beside the checkout; a test that needs them skips where they are missing."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh-rlhf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder
