import pytest

from tenure.errors import SpecError
from tenure.serve.limits import DoorLimits


def test_a_limit_that_lets_nothing_through_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match="max_connections must be above 0; found 0"):
        DoorLimits(max_connections=0)
