import pytest
from tests.contracts.process_contract import AsRoot, UnderCgroup, UnderRlimits


@pytest.mark.cgroup
class TestProcessUnderCgroup(UnderCgroup):
    confine = "cgroup"


class TestProcessUnderRlimits(UnderRlimits):
    confine = "rlimit"


class TestAsRoot(AsRoot):
    confine = "auto"
