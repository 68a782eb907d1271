from __future__ import annotations

from pathlib import Path

import pytest

from .races import compete


@pytest.mark.real
def test_eight_processes_that_publish_the_same_names_have_one_effect_each(tmp_path: Path) -> None:
    tally = compete(tmp_path, 15)
    assert not tally.wrong
    assert tally.races == 15
    assert tally.double_starts > 0
