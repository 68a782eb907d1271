"""The runtime contract on unified control groups, in a guest that is booted once for all worlds."""

import pytest
from tests.guest import machine
from tests.guest.worlds import WORLDS

pytestmark = [pytest.mark.real, pytest.mark.guest, pytest.mark.timeout(machine.FIRST_MAX_S + machine.BOOT_MAX_S + 60)]
LISTED = (machine.ROOT / "docs/runtimes.md").read_text()


@pytest.fixture(scope="module")
def boot():
    try:
        return machine.boot(list(WORLDS))
    except machine.Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", WORLDS)
def test_the_runtime_contract_holds_on_unified_groups(boot, name, capsys):
    world = boot.worlds.get(name, {})
    tests = world.get("tests", {})
    with capsys.disabled():
        print(f"\n{machine.summary(boot, name)}")
    failed = {test: found["why"] for test, found in tests.items() if found["outcome"] == "failed"}
    assert tests, f"world {name} gave no results; look into {machine.LOG}"
    assert not failed, f"{len(failed)} failed, log {machine.LOG}\n" + "\n".join(
        f"{test}: {why}" for test, why in failed.items()
    )
    assert world["status"] == 0, machine.LOG
    for test, found in tests.items():
        if found["outcome"] == "skipped":
            assert machine.is_listed(found["why"], LISTED), f"{test} was skipped: {found['why']}"


def test_the_guest_comes_to_its_own_end(boot):
    assert boot.ended, f"the guest was ended by the bound of {machine.BOOT_MAX_S:g} s; look into {machine.LOG}"
