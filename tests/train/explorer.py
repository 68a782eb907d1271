"""Interleavings of the real training protocol: handler, slot, exchange and store run as they are, in greenlets, on one thread.

Every operation on files, every sleep and every invocation is a point at which any other worker may go on, the process may
be killed (before it, after it, or with half a file written), or time may pass. Which of these happens is drawn from the
seed of a `Schedule`: the same schedule gives the same run, to the last file operation. The disk is in memory, time is
virtual; each process has a clock of its own, which may be wrong, fast, or stand still.

A broker is played: it starts the events' processes, each grant with a higher fence, starts what died with the same event,
takes a live worker for dead now and then (the old process goes on as a zombie), and may begin a second generation.
What must hold afterwards is in `oracle`. Not here: real processes (tests/train/test_races.py).
"""

from __future__ import annotations

import contextlib
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from greenlet import getcurrent, greenlet

from tenure.errors import JobFailed, StaleFence
from tenure.train import handler, slot
from tenure.train.events import parse
from tenure.train.handler import Context, Outcome, handle
from tenure.train.programs import Program
from tenure.train.spec import TrainSpec
from tenure.train.store import Store

from .memory_files import Disk, Inode, MemoryFiles


class Place(str):
    """A path as text: pathlib would take a fifth of the time."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self}/{name}")

    @property
    def name(self) -> str:
        """See pathlib."""
        return self.rpartition("/")[2]

    def with_name(self, name: str) -> Place:
        """See pathlib."""
        return Place(f"{self.rpartition('/')[0]}/{name}")


ROOT: Any = Place("/store")
PERIOD_S = 1.0
"""Claim period."""
OPERATION_S = 0.002
"""What one operation takes."""
SLEEP_S = 0.25
"""The shortest sleep: shorter ones only make runs longer."""
MAX_STEPS = 40_000
MAX_S = 900.0
FAULTY = ("nodes", "sums", "weights", "rounds", "layout.json", "claims")
"""What may rot: whatever is not forced to disk."""


_noted: dict[str, Any] = {}


class Killed(BaseException):
    """SIGKILL, as far as the code under test can tell."""


class Hangs(AssertionError):
    """The run did not end within the bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """All that decides about one run. `repr` is what replays it."""

    seed: int
    workers: int = 2
    shards: int = 4
    rounds: int = 3
    exchange: str = "sharded"
    policy: str = "walk"
    """`walk`: any worker that can goes on. `pct`: the one of the highest priority, which changes at random points."""
    preempt_at: tuple[int, ...] = ()
    """With `pct`: the operations after which the running process falls behind all others; (): drawn."""
    kill_every: float = 0.0
    """Mean number of operations between two deaths; 0: none."""
    stall_every: float = 0.0
    """Mean number of operations after which a process stands still for up to three claim periods."""
    zombies: float = 0.0
    """Probability that a started process is taken for dead while it runs."""
    rot: int = 0
    """Files that are cut off or changed."""
    blackouts: int = 0
    """How often everything is killed and what was not forced to disk may be torn."""
    second: int = 0
    """Workers of a second generation that begins in the middle; 0: none."""
    clocks: str = "right"
    """`right`, `wrong` (offset and speed) or `still` (stands for several claim periods)."""
    slot_s: float = math.inf
    goal: float = 0.0
    evaluate_every: int = 1
    nan_round: int = -1
    """Round whose loss is NaN."""
    lost_answers: bool = False
    """LINKs whose answer is lost, as on NFS."""

    @classmethod
    def draw(cls, seed: int) -> Schedule:
        """Return a schedule with all of the above drawn from the seed."""
        rng = random.Random(f"schedule {seed}")
        workers = rng.choice((2, 2, 3))
        return cls(
            seed=seed,
            workers=workers,
            shards=rng.choice((3, 4, 5)),
            rounds=rng.choice((2, 3)),
            exchange=rng.choice(("sharded", "sharded", "central")),
            policy=rng.choice(("walk", "pct")),
            kill_every=rng.choice((0, 40, 120, 400)),
            stall_every=rng.choice((0, 0, 100, 400)),
            zombies=rng.choice((0, 0, 0.3)),
            rot=rng.choice((0, 0, 0, 1, 3)),
            blackouts=rng.choice((0, 0, 0, 1)),
            second=rng.choice((0, 0, 1, 2, 3)),
            clocks=rng.choice(("right", "wrong", "still")),
            slot_s=rng.choice((math.inf, math.inf, 4.0, 1.5)),
            goal=rng.choice((0.0, 0.0, 0.2)),
            evaluate_every=rng.choice((1, 1, 2)),
            nan_round=rng.choice((-1,) * 19 + (1,)),
            lost_answers=rng.random() < 0.2,
        )


@dataclass(slots=True)
class Process:
    """One process of one worker: a greenlet, a clock, a fence."""

    worker: int
    fence: int
    event: dict[str, Any]
    generation: int
    started_s: float
    offset_s: float = 0.0
    speed: float = 1.0
    still: tuple[float, float] = (0.0, 0.0)
    """The clock stands from the one to the other, in true time."""
    wake_s: float = 0.0
    priority: float = 0.0
    countdown: int = -1
    """Operations until it is killed; -1: it is not."""
    how: str = "before"
    dead: bool = False
    store: Any = None
    let: greenlet = None

    def clock_s(self, now_s: float) -> float:
        """Return this process's monotonic clock."""
        begin, end = self.still
        if now_s > begin:
            now_s = begin if now_s < end else now_s - (end - begin)
        return self.offset_s + self.speed * now_s


@dataclass(slots=True)
class Publication:
    """A name that appeared."""

    name: str
    content: bytes
    at_s: float
    worker: int
    fence: int


class SteppedFiles(MemoryFiles):
    """Every operation is a step of the run. Once its process is dead, nothing works any more."""

    def __init__(self, run: Run, process: Process) -> None:
        super().__init__(run.disk, lost_answer=run.loses_answer)
        self._run, self._process = run, process

    def _step(self, operation: Callable[..., Any], *args: Any, **options: Any) -> Any:
        kill = self._run.point(self._process)
        if kill == "torn" and operation.__func__ is MemoryFiles._write:  # type: ignore[attr-defined]
            temp, pieces, durable = args
            whole = b"".join(pieces)
            operation(temp, [whole[: self._run.rng.randrange(len(whole) + 1)]], durable)
        elif kill == "after":
            with contextlib.suppress(OSError):  # it dies before it learns of it
                operation(*args, **options)
        elif not kill:
            return operation(*args, **options)
        self._process.dead = True
        self._run.died_at.append(str(args[0]))
        raise Killed

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytearray:
        """See Files."""
        return bytearray(self._step(super().read, path, offset, size))

    def replace(self, path: Path, content: bytes) -> None:
        """See Files. A finished file of the store may never be overwritten."""
        self._step(self._overwrite, path, content)

    def link(self, temp: Path, path: Path) -> bool:
        """See Files."""
        return bool(self._step(self._link, temp, path))

    def move(self, source: Path, target: Path) -> bool:
        """See Files."""
        return bool(self._step(super().move, source, target))

    def remove(self, path: Path) -> None:
        """See Files."""
        self._step(super().remove, path)

    def names(self, folder: Path, *, hidden: bool = False) -> list[str]:
        """See Files."""
        return list(self._step(super().names, folder, hidden=hidden))

    def exists(self, path: Path) -> bool:
        """See Files."""
        return bool(self._step(super().exists, path))

    def make_folder(self, path: Path) -> None:
        """See Files. No step when it is there: nothing is changed then, and nothing learnt."""
        if str(path) not in self.disk.folders:
            self._step(super().make_folder, path)

    def _write(self, temp: Path, pieces: Iterable[bytes | memoryview], durable: bool) -> None:
        self._step(super()._write, temp, pieces, durable)
        if durable:
            self._run.durable.add(self.disk.at(temp)[0][temp.name])

    def _overwrite(self, path: Path, content: bytes) -> None:
        if super().exists(path):
            self._run.overwritten.append(str(path))
        super().replace(path, content)
        self._run.published(self._process, path, self._inode(path))

    def _link(self, temp: Path, path: Path) -> bool:
        there = super().exists(path)
        answer = super().link(temp, path)
        if not there:
            self._run.published(self._process, path, self._inode(path))
        return answer


class WatchedStore(Store):
    """Counts by itself what its process had done already, and whether a process published that knew of a newer fence."""

    def __init__(self, run: Run, process: Process, files: MemoryFiles) -> None:
        self.run = run
        self.refused = 0
        super().__init__(ROOT, worker=process.worker, fence=process.fence, files=files)

    def _publish(self, name: str, pieces: list[Any], *, durable: bool) -> bool:
        newest = self.run.newest_fence(self.worker)
        created = super()._publish(name, pieces, durable=durable)
        if newest > self.fence:
            self.run.stale.append(f"{name} by fence {self.fence} of worker {self.worker} after fence {newest}")
        if not created and name.split("/")[0] not in ("claims", "layout.json", "failures"):
            self.refused += 1
        return created


@dataclass(slots=True)
class Run:
    """One interleaving, from the first event to the end of all processes."""

    schedule: Schedule
    program: Program
    disk: Disk = field(default_factory=Disk)
    now_s: float = 0.0
    steps: int = 0
    deaths: int = 0
    zombies: int = 0
    died_at: list[str] = field(default_factory=list)
    """Paths whose operation was the last of a process that was killed."""
    publications: list[Publication] = field(default_factory=list)
    overwritten: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    """Publications that the fence should have kept back."""
    rotten: list[str] = field(default_factory=list)
    """Names whose file was spoiled."""
    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What processes ended with that has a name."""
    double_starts: int = 0
    uncounted: int = 0
    """Double starts that the store's own counter does not have."""
    durable: set[Inode] = field(default_factory=set)
    on_point: Callable[[Run, Process], str] | None = None
    """Asked at each operation of a process: how to kill it there (`before`, `after`, `torn`), or nothing."""
    restart_s: tuple[float, ...] = (0.0, 0.1, 3 * PERIOD_S)
    """From a death to the next process, one of these."""
    sleep_s: float = SLEEP_S
    """The shortest sleep, and the longest pause between two looks at the store."""
    operation_s: float = OPERATION_S
    max_steps: int = MAX_STEPS
    rng: random.Random = field(init=False)
    spec: TrainSpec = field(init=False)
    _processes: list[Process] = field(default_factory=list)
    _queues: dict[int, deque[dict[str, Any]]] = field(default_factory=dict)
    _holders: dict[int, Process | None] = field(default_factory=dict)
    """Worker -> the process that the broker takes for its newest."""
    _known: set[str] = field(default_factory=set)
    _timers: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _fence: int = 0
    _generation: int = 0
    _fences: dict[int, int] = field(default_factory=dict)
    _changes: set[int] = field(default_factory=set)
    _hub: greenlet = None

    def __post_init__(self) -> None:
        plan = self.schedule
        self.rng = random.Random(plan.seed)
        self.spec = TrainSpec(
            program="floats.py:Floats",
            folder="/floats",
            shards=plan.shards,
            max_rounds=plan.rounds,
            exchange=plan.exchange,
            goal_accuracy=plan.goal,
            evaluate_every=plan.evaluate_every,
            claim_period_s=PERIOD_S,
            wait_s=MAX_S,
            max_idle_slots=1000,
            seed=5,
        )

    # --- from the outside ---------------------------------------------------------------------------------------------

    def go(self) -> Run:
        """Run until no event is left. Raises Hangs; an error that no process may end with comes through."""
        plan, rng = self.schedule, self.rng
        self._hub = getcurrent()
        if plan.policy == "pct":
            self._changes = set(plan.preempt_at) or {rng.randrange(1500) for _ in range(rng.randrange(1, 5))}
        self._begin(plan.workers)
        if plan.second:
            self._after(rng.uniform(0, 1.5), lambda: self._begin(plan.second))
        for _ in range(plan.rot):
            self._after(rng.uniform(0.1, 2), self._spoil_one)
        for _ in range(plan.blackouts):
            self._after(rng.uniform(0.1, 2), self._blackout)
        try:
            self._play()
        finally:
            for process in self._processes:
                process.dead = True
                if process.let:  # it has begun
                    process.let.throw(Killed)
        return self

    def _play(self) -> None:
        # Circumstances are the same for all here, and noting them for each process would take a sixth of the time.
        if not _noted:
            _noted.update(handler.circumstances(Path(self.spec.folder), {}, self.program.data({})))
        noted = mock.patch.object(handler, "circumstances", return_value=_noted)
        # Stalls here are longer than slots: who makes no progress in several slots is to go on all the same.
        patient = mock.patch.object(slot, "SHORT_SLOTS", self.spec.max_idle_slots)
        with noted, patient:
            while self._processes or self._timers:
                ready = [process for process in self._processes if process.wake_s <= self.now_s]
                if not ready or (self._timers and self._timers[0][0] <= self.now_s):
                    self._advance()
                    continue
                process = ready[0] if len(ready) == 1 else self._choose(ready)
                process.let.switch()
                if process.let.dead:
                    self._ended(process)

    def newest_fence(self, worker: int) -> int:
        """Return the newest fence that the store knows of a worker."""
        return self._fences.get(worker, 0)

    # --- from within processes ----------------------------------------------------------------------------------------

    def point(self, process: Process) -> str:
        """Let others go on; return how to die here, or nothing."""
        if process.dead:
            return "before"
        self._hub.switch()
        if process.dead:
            return "before"
        self.steps += 1
        self.now_s += self.operation_s
        if self.steps > self.max_steps or self.now_s > MAX_S:
            raise Hangs(f"not done after {self.steps} operations and {self.now_s:.0f} s")
        if self.on_point is not None and (how := self.on_point(self, process)):
            return how
        if self.schedule.stall_every and self.rng.random() * self.schedule.stall_every < 1:
            process.wake_s = self.now_s + self.rng.uniform(0, 3 * PERIOD_S)
            self._hub.switch()
            if process.dead:
                return "before"
        if process.countdown >= 0:
            process.countdown -= 1
            if process.countdown < 0:
                return process.how
        return ""

    def loses_answer(self) -> bool:
        """Tell whether the answer to a LINK is lost."""
        return self.schedule.lost_answers and self.rng.random() < 0.2

    def published(self, process: Process, path: Path, inode: Inode) -> None:
        """Note a name that appeared."""
        name = str(path).removeprefix(f"{ROOT}/")
        if name.startswith("fences/"):
            self._fences[process.worker] = max(process.fence, self.newest_fence(process.worker))
        self.publications.append(Publication(name, inode.content, self.now_s, process.worker, process.fence))

    # --- the broker ---------------------------------------------------------------------------------------------------

    def _begin(self, workers: int) -> None:
        """Begin a generation. Whoever runs of the one before goes on unobserved, or is killed."""
        for worker, process in self._holders.items():
            if process is not None and self.rng.random() < 0.5:
                self._kill(process)
            self._holders[worker] = None
            self._queues[worker].clear()
        self._invoke({"start": True, "workers": workers, "generation": self._generation, "worker": 0})
        self._generation += 1

    def _invoke(self, event: dict[str, Any]) -> None:
        name = parse(event).name
        if name not in self._known:
            self._known.add(name)
            worker = int(event["worker"])
            self._queues.setdefault(worker, deque()).append(event)
            self._start(worker)

    def _start(self, worker: int) -> None:
        """Start the worker's next event, if none of its processes is held for running."""
        queue, plan, rng = self._queues[worker], self.schedule, self.rng
        if self._holders.get(worker) is not None or not queue:
            return
        self._fence += 1
        process = Process(worker, self._fence, queue[0], int(queue[0]["generation"]), self.now_s, priority=rng.random())
        process.wake_s = self.now_s + rng.uniform(0, 0.2)
        if plan.clocks != "right":
            process.offset_s = rng.uniform(-1e6, 1e6)
        if plan.clocks == "wrong":
            process.speed = rng.choice((0.5, 1.0, 3.0))
        if plan.clocks == "still":
            begin = self.now_s + rng.uniform(0, 1)
            process.still = (begin, begin + rng.uniform(0, 8 * PERIOD_S))
        if plan.kill_every:
            process.countdown = int(rng.expovariate(1 / plan.kill_every))
            process.how = rng.choice(("before", "after", "torn"))
        if rng.random() < plan.zombies:
            self._after(rng.uniform(0, 1), lambda: self._give_up(process))
        process.let = greenlet(lambda: self._main(process), parent=self._hub)
        self._holders[worker] = process
        self._processes.append(process)

    def _main(self, process: Process) -> None:
        """Be the process, as `tenure.train.worker` is."""

        def invoke(event: dict[str, Any]) -> None:
            if how := self.point(process):
                if how == "after":
                    self._invoke(event)
                process.dead = True
                raise Killed
            self._invoke(event)

        def sleep(seconds: float) -> None:
            process.wake_s = self.now_s + max(seconds, self.sleep_s)
            if self.point(process):
                process.dead = True
                raise Killed

        def clock_s() -> float:
            return process.clock_s(self.now_s)

        try:
            process.store = WatchedStore(self, process, SteppedFiles(self, process))
            ends_s = clock_s() + self.schedule.slot_s
            context = Context(
                spec=self.spec,
                store=process.store,
                program=lambda: self.program,
                invoke=invoke,
                remaining_s=lambda: ends_s - clock_s(),
                monotonic=clock_s,
                sleep=sleep,
                timer=clock_s,
                utc=clock_s,
                poll_s=self.sleep_s,
            )
            self.outcomes.append(handle(parse(process.event), context))
        except Killed:
            pass
        except (JobFailed, StaleFence) as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            if isinstance(error, StaleFence) and self.newest_fence(process.worker) <= process.fence:
                raise AssertionError(f"the newest grant was refused: {error}") from error

    def _ended(self, process: Process) -> None:
        self._processes.remove(process)
        if (store := process.store) is not None:
            self.double_starts += store.double_starts
            self.uncounted += max(0, store.refused - store.double_starts)
        held = self._holders.get(process.worker) is process
        if held:
            self._holders[process.worker] = None
        if process.dead:
            self.deaths += 1
            if held:
                self._after(self.rng.choice(self.restart_s), lambda: self._start(process.worker))
        elif held:
            if self._queues[process.worker]:
                self._queues[process.worker].popleft()
            self._start(process.worker)

    def _give_up(self, process: Process) -> None:
        """Take a live process for dead: another one begins with the same event and a higher fence."""
        if self._holders.get(process.worker) is process and not process.dead:
            self.zombies += 1
            self._holders[process.worker] = None
            self._start(process.worker)

    def _kill(self, process: Process) -> None:
        if not process.dead:
            process.dead = True
            process.wake_s = self.now_s

    # --- the scheduler ------------------------------------------------------------------------------------------------

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now_s + seconds, self.rng.getrandbits(40), act))

    def _advance(self) -> None:
        """Let time pass until a process can go on or something falls due; do what does."""
        awake = min((process.wake_s for process in self._processes), default=math.inf)
        due = self._timers[0][0] if self._timers else math.inf
        self.now_s = max(self.now_s, min(awake, due))
        while self._timers and self._timers[0][0] <= self.now_s:
            heapq.heappop(self._timers)[2]()

    def _choose(self, ready: list[Process]) -> Process:
        if self.schedule.policy == "walk":
            return ready[int(self.rng.random() * len(ready))]
        chosen = max(ready, key=lambda process: process.priority)
        if self.steps in self._changes:
            self._changes.discard(self.steps)
            chosen.priority = min(process.priority for process in self._processes) - 1
        return chosen

    # --- the disk's faults --------------------------------------------------------------------------------------------

    def _spoil_one(self) -> None:
        names = [
            f"{folder}/{name}"
            for folder in (str(ROOT), *(f"{ROOT}/{part}" for part in FAULTY))
            for name in sorted(self.disk.folders.get(folder, ()))
            if not name.startswith(".")
        ]
        names = [name for name in names if name.removeprefix(f"{ROOT}/").split("/")[0] in FAULTY]
        if names:
            self._spoil(self.rng.choice(names))

    def _spoil(self, path: str) -> None:
        folder, _, name = path.rpartition("/")
        inode, rng = self.disk.folders[folder][name], self.rng
        content = bytearray(inode.content)
        if content and rng.random() < 0.5:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(len(content) + 1) :]
        if bytes(content) != inode.content:
            inode.content = bytes(content)
            self.rotten.append(path.removeprefix(f"{ROOT}/"))

    def _blackout(self) -> None:
        """Kill everything; what was not forced to disk may be torn."""
        for process in self._processes:
            self._kill(process)
        for folder, files in sorted(self.disk.folders.items()):
            for name, inode in sorted(files.items()):
                if inode not in self.durable and not folder.endswith("/fences") and self.rng.random() < 0.3:
                    self._spoil(f"{folder}/{name}")
                    if self.rng.random() < 0.3:
                        del self.disk.folders[folder][name]
