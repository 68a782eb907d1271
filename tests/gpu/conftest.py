from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.gpu.fakes import pynvml as fake
from tests.gpu.machine import FAKES, MadeUp, whole


@pytest.fixture
def made_up() -> Iterator[MadeUp]:
    """A machine with one device, for programs that are given its environment."""
    made = MadeUp(whole())
    yield made
    made.close()


@pytest.fixture
def here(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    """The same, as this process sees it."""
    import os
    import sys

    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setenv("TENURE_FAKE_GPU", str(made_up.folder))
    monkeypatch.setenv("TENURE_NVML", "1")
    monkeypatch.setenv("PATH", os.pathsep.join([str(FAKES), os.environ["PATH"]]))
    return made_up
