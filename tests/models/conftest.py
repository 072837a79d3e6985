"""One thread for small models: with several, they wait for each other longer than they compute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    if request.node.get_closest_marker("weights") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
