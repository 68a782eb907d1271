"""How few system calls a service's profile allows, and whether it ever stops what it should let through.

Services: the perceptron of `benchmarks.image_models` with each of the 5 engines, profile as the product makes it from the
analysis of that service.
Count: different names that the profile of x86-64 allows, with or without conditions on arguments; names of other
architectures do not count. The whole profile: what a container engine's own start needs inside the filter is part of it.
False kills: the first 100 held-out runs of each engine (`benchmarks.image_grammar`, --quick: 4 of each of NumPy, ONNX Runtime
and LiteRT) lived under the profile, in the root form, or in a container where the process runtime can't filter. A run whose
outcome (see `image_soundness`) is not that of the same form without a profile is a false kill; the kernel's log or the exit
names the call where it can.
Bar: at most 55 names for every engine (`value` is the largest), and no false kill. By hand 42 to 53 were traced.
Checked: inside, calls that are in no list (`ptrace`, `unshare` of a user namespace, `keyctl`, `bpf`, `mount`) are refused.
Control: the profile without the call by which the server waits for its connections: its first run must be stopped.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import image_builds as builds
from benchmarks import image_models as models
from benchmarks.harness import Control, Options, Result, Skip, judge
from benchmarks.image_grammar import Run, draw
from benchmarks.image_player import Outcome, differences, live
from tenure.runtimes.seccomp import for_container

NAME = "image_seccomp"
BAR = "a profile of at most 55 system calls per engine, and no held-out run is stopped by it"
KIND = "perceptron"
RUNS, QUICK_RUNS, QUICK_S = 100, 4, 40.0
MAX_NAMES = 55
WAITS = ("epoll_wait", "epoll_pwait", "poll", "ppoll", "select", "pselect6")
REFUSED = {"ptrace": 101, "unshare": 272, "keyctl": 250, "bpf": 321, "mount": 165}
"""In no list, with their numbers on x86-64."""
_TRY = """
import ctypes, json, sys
from tenure.runtimes.become import filter_calls
from tenure.runtimes.seccomp import compiled, read_profile
filter_calls(compiled(read_profile(sys.argv[1], whose="this check")))
libc = ctypes.CDLL(None, use_errno=True)
def tried(name, number):
    first = 0x10000000 if name == "unshare" else 0
    return ctypes.get_errno() if libc.syscall(number, first, 0, 0, 0, 0) else 0
print(json.dumps({name: tried(name, number) for name, number in json.loads(sys.argv[2]).items()}))
"""


@dataclass(slots=True)
class Subject:
    """One engine: its image, its profile, and what its runs came to."""

    engine: str
    image: builds.Built
    runs: int = 0
    kills: list[str] = field(default_factory=list)
    unsteady: list[str] = field(default_factory=list)

    @property
    def profile(self) -> Path:
        """Return where the image's profile lies."""
        return self.image.folder / "seccomp.json"

    def outcome(self, run: Run, profile: Path | None) -> Outcome:
        """Live a run in the image's root, behind a profile or none."""
        return live(lambda run: builds.in_root(self.image, run, profile=profile), run, self.image.served)

    def runs_of_it(self) -> Iterator[Run]:
        """Yield the held-out runs of its model, in order."""
        service = models.service(self.engine)
        return (run for number in itertools.count() if (run := draw(service, number)).start.model == KIND)

    def judge(self, run: Run) -> None:
        """Live a run behind the profile and without, and count what it comes to."""
        self.runs += 1
        if not differences(self.outcome(run, None), self.outcome(run, self.profile)):
            return
        free, again, held = self.outcome(run, None), self.outcome(run, None), self.outcome(run, self.profile)
        if differences(free, again) or not (told := differences(again, held)):
            self.unsteady.append(f"{self.engine} {run.number}")
            return
        self.kills.append(f"{self.engine} {run.number}: {'; '.join(told)[:200]}; it wrote {held.output[-200:]!r}")
        print(f"stopped: {self.kills[-1]}", flush=True)

    def names(self) -> tuple[list[str], list[str]]:
        """Return the names that the profile lets through, and those that a container's start adds."""
        text = self.profile.read_text()
        own = allowed(text)
        return sorted(own), sorted(allowed(for_container(text, whose=self.engine)) - own)

    def let_through(self) -> list[str]:
        """Return which of the calls that are in no list are not refused behind the profile."""
        argv = [sys.executable, "-c", _TRY, str(self.profile), json.dumps(REFUSED)]
        done = subprocess.run(
            argv, env=builds.environment(self.image.home), capture_output=True, text=True, timeout=60, check=True
        )
        return [name for name, errno in json.loads(done.stdout).items() if errno not in (1, 38)]

    def control(self) -> list[str]:
        """Return what the first run differs in without the calls by which a server waits."""
        document = json.loads(self.profile.read_text())
        for rule in document["syscalls"]:
            rule["names"] = [name for name in rule["names"] if name not in WAITS]
        document["syscalls"] = [rule for rule in document["syscalls"] if rule["names"]]
        deaf = self.image.folder.parent / f"deaf-{self.engine}.json"
        deaf.write_text(json.dumps(document))
        run = next(self.runs_of_it())
        return differences(self.outcome(run, None), self.outcome(run, deaf))


def allowed(text: str) -> set[str]:
    """Return the names that a profile lets through, with or without conditions."""
    return {name for rule in json.loads(text)["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}


def run(options: Options) -> Result:
    """Build, count, live the held-out runs behind the profiles, and see the control stopped."""
    builds.need_tools()
    wanted = models.LIGHT if options.quick else models.ENGINES
    lacking = {engine: why for engine in wanted if (why := builds.available(engine))}
    if len(lacking) == len(wanted):
        raise Skip("; ".join(lacking.values()))
    if why := builds.cannot_run("root"):
        raise Skip(why)
    with builds.workshop() as folder:
        subjects = [Subject(engine, builds.build(engine, KIND, folder)) for engine in wanted if engine not in lacking]
        ends_s = time.monotonic() + QUICK_S
        draws = {subject.engine: subject.runs_of_it() for subject in subjects}
        for _ in range(QUICK_RUNS if options.quick else RUNS):
            for subject in subjects:
                if not options.quick or time.monotonic() < ends_s or subject.runs == 0:
                    subject.judge(next(draws[subject.engine]))
        names = {subject.engine: subject.names() for subject in subjects}
        open_ones = {subject.engine: through for subject in subjects if (through := subject.let_through())}
        controls = {subject.engine: subject.control() for subject in subjects}
    return _result(subjects, names, open_ones, controls, lacking)


def _result(
    subjects: list[Subject],
    names: dict[str, tuple[list[str], list[str]]],
    open_ones: dict[str, list[str]],
    controls: dict[str, list[str]],
    lacking: dict[str, str],
) -> Result:
    counts = {engine: len(own) + len(added) for engine, (own, added) in names.items()}
    kills = [kill for subject in subjects for kill in subject.kills]
    spared = [engine for engine, told in controls.items() if not told]
    control = Control(
        name="the profile without the calls by which a server waits",
        value=None,
        failed=not spared,
        how=f"{', '.join(spared)} was not stopped" if spared else "; ".join(f"{e}: {t[0][:60]}" for e, t in controls.items()),
    )
    over = [f"{engine}: {count} names" for engine, count in counts.items() if count > MAX_NAMES]
    broken = [*over, *kills, *(f"{engine} lets through {through}" for engine, through in open_ones.items())]
    holds, why = judge(not broken, control)
    return Result(
        value=float(max(counts.values())),
        spread=None,
        unit="names",
        holds=holds,
        why=" | ".join(broken[:6]) or why,
        control=control,
        details={
            "names_with_a_containers_start": counts,
            "names_of_the_profile": {engine: len(own) for engine, (own, _) in names.items()},
            "runs": {subject.engine: subject.runs for subject in subjects},
            "false_kills": kills,
            "unsteady": [name for subject in subjects for name in subject.unsteady],
            "profiles": {engine: own for engine, (own, _) in names.items()},
            "left_out": lacking,
        },
    )
