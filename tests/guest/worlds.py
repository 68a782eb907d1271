"""The worlds in which the contract suite runs inside the guest: who the agent is, where it stands, what it may do there.

The groups are laid out as systemd lays them out (its control group interface, and `man systemd.scope`): a slice for the
system and one for each user; a user's manager owns `user@UID.service` and all below; a session's scope belongs to root.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

TOP = Path("/sys/fs/cgroup")
SLICE = TOP / "user.slice/user-1000.slice"
MANAGER = SLICE / "user@1000.service"
ALL = ("cpu", "memory", "pids")
OLD = TOP / "user.slice/user-1001.slice/user@1001.service"
USER = 1000
SUITE = "tests/guest/suite.py"


@dataclass(frozen=True, slots=True)
class World:
    """Where one run of pytest stands."""

    name: str
    uid: int
    group: Path
    """The group it is put into; a process that stands for a shell is there too unless `alone`."""
    tests: tuple[str, ...]
    """What pytest is told to run."""
    owned: tuple[Path, ...] = ()
    """Groups given to the user, outermost first."""
    controllers: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    """Group -> what is switched on for those below it, outermost first; ancestors not named here have all."""
    delegated: bool = False
    """Whether the group carries systemd's mark of delegation."""
    alone: bool = False
    only: str = ""
    """What of these tests is run, as pytest's -k takes it; all when empty."""
    broken: bool = False
    """Whether limits are left unwritten (the control)."""


def _on(*folders: Path, only: tuple[str, ...] = ALL) -> dict[Path, tuple[str, ...]]:
    return dict.fromkeys(folders, only)


_OF_THE_BOUNDS = "memory or cpus or quota or share or too_large or double or bomb or hides or is_said"
"""What the missing of a controller, or of all, can touch. The rest is run where all are there, and for rlimits on the host."""
_SYSTEM = _on(TOP, TOP / "user.slice")
WORLDS = {
    world.name: world
    for world in (
        World(
            "v2-root",
            0,
            TOP / "user.slice/user-0.slice/session-1.scope",
            (f"{SUITE}::TestUnderCgroup", f"{SUITE}::TestAsRoot", f"{SUITE}::TestPlaces", f"{SUITE}::TestInsideALease"),
            controllers=_SYSTEM,
        ),
        World(
            "v2-delegated",
            USER,
            MANAGER / "app.slice/run-1.scope",
            (f"{SUITE}::TestUnderCgroup", f"{SUITE}::TestInsideALease"),
            owned=(MANAGER, MANAGER / "app.slice", MANAGER / "app.slice/run-1.scope"),
            controllers=_SYSTEM | _on(SLICE, MANAGER, MANAGER / "app.slice"),
            delegated=True,
        ),
        World(
            "v2-no-rights",
            USER,
            SLICE / "session-2.scope",
            (f"{SUITE}::TestUnderRlimits",),
            controllers=_SYSTEM | _on(SLICE),
            only=_OF_THE_BOUNDS,
        ),
        World(
            "v2-no-cpu",
            USER + 1,
            OLD / "app.slice/run-1.scope",
            (f"{SUITE}::TestWithoutCpu",),
            owned=(OLD, OLD / "app.slice", OLD / "app.slice/run-1.scope"),
            controllers=_SYSTEM | _on(OLD.parent, OLD, OLD / "app.slice", only=("memory", "pids")),
            delegated=True,
            only=_OF_THE_BOUNDS,
        ),
    )
}
CONTROL = World(
    "v2-control",
    0,
    TOP / "system.slice/control.service",
    (f"{SUITE}::TestUnderCgroup::test_a_tree_that_is_too_large_only_together_is_ended",),
    controllers=_on(TOP, TOP / "system.slice"),
    broken=True,
    alone=True,
)
"""The same suite over a runtime that writes no memory limits: it must fail."""


def switch_on(folder: Path, names: tuple[str, ...] = ALL) -> None:
    """Hand controllers on to the groups below."""
    (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in names))


def lay_out(world: World) -> None:
    """Make the world's groups with their owners, and switch on what it says. Raises OSError."""
    for folder, names in world.controllers.items():
        folder.mkdir(parents=True, exist_ok=True)
        switch_on(folder, names)
    for folder in (*world.owned, world.group):
        folder.mkdir(parents=True, exist_ok=True)
    for folder in world.owned:
        for path in (folder, *(folder / name for name in ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control"))):
            os.chown(path, world.uid, world.uid)
    if world.delegated:
        os.setxattr(world.group, "user.delegate", b"1")
