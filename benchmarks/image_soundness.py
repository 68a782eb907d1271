"""How often a service in its root form misses a file that the exercise did not find: in held-out runs.

Held out: `benchmarks.image_grammar` and its `HELD_OUT_SEED`, committed before any code that makes closures. The analysis never
sees them; it has only the product's own exercise of a served model (NumPy's program: the exercise commands of its author,
`benchmarks/programs/numpy_exercise.py`: batches of 1 and 5, one refused request).
A run: one life of a service in the root form. It starts with drawn options, gets the drawn exchanges, ends as drawn. The same
run is lived by the bare process. 1,000 runs: 200 of each of the 5 engines, over its 3 models (--quick: 8 of each of NumPy,
ONNX Runtime and LiteRT, the first of the convolution, or as many as fit into 50 s, how many is told; of roots from which
nothing was left out).
A miss: a run whose outcome in the root form is not that of the bare process. Outcome: per exchange the status and the answer
(tensors byte by byte, but within `image_answers`' tolerance where requests at once may have shared a batch; of an error its
text with folders and ports taken out; of metrics the names; not that of the request on its way at the end), and the exit code
(after two SIGTERM -15 is 0: an interpreter that ends puts its handlers away). A run that differs is repeated once in both;
what differs then between two lives of the bare process is no miss (timing) but counted as `unsteady`, at most 1 % may be. What
was missed is asked of the product, which must name a file; the closure is repaired by its one command, and the run must then
pass. Every 20th run of the bare process is lived under a trace of file calls besides: a file that it opened with success and
that the closure neither holds nor leaves out by rule is a miss, too (`unseen_files`).
Bar: misses in at most 1 of 1,000 runs (`value`: misses per 1,000), each named and repaired. A miss is repaired after it was
counted, once per file.
So that naming is shown even where nothing is missed: from each closure 3 files that were needed are taken, one at a time (drawn
by the seed: a module, a shared object, a file that is only stat-ed; --quick: a shared object of the first engine), and all must
be named and repaired.
Control: the same closures without the files that were only stat-ed, as tools that trace `open` make them: the first run of
every engine must miss.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import image_builds as builds
from benchmarks import image_models as models
from benchmarks.harness import Control, Options, Result, Skip, judge
from benchmarks.image_grammar import Run, draw
from benchmarks.image_player import Outcome, differences, live
from tenure.images.closure_rules import Rules

NAME = "image_soundness"
BAR = "held-out runs from a grammar: a file is missing in at most 1 of 1,000, named and repaired"
RUNS, QUICK_RUNS, QUICK_S = 200, 8, 50.0
QUICK_KIND = "convolution"
LIMIT_PER_1000, UNSTEADY_SHARE = 1.0, 0.01
TRACED_EVERY = 20
SORTS = ("shared object", "module", "only stat-ed")
SEARCHED = 12
"""Files taken away one after another until a run misses one; what no run needs shows nothing."""
_OPENED = re.compile(r"^\d+\s+open(?:at2?)?\((.*)\)\s+= \d+<(/[^>]*)>$")
_MADE = re.compile(r"O_CREAT|O_WRONLY|O_RDWR|O_DIRECTORY|O_PATH")
RULES = Rules(home=os.path.expanduser("~"))
"""What the product leaves out of every closure, of a machine's own: that it does is no miss."""
_GONE = re.compile(r" \(deleted\)$|^/memfd:")


@dataclass(slots=True)
class Tally:
    """What the runs of one engine came to."""

    runs: int = 0
    traced: int = 0
    misses: list[str] = field(default_factory=list)
    """Run, and what differed."""
    unnamed: list[str] = field(default_factory=list)
    """Misses that were not named and repaired."""
    unsteady: list[str] = field(default_factory=list)
    unseen: set[str] = field(default_factory=set)
    """Files that a traced process opened, and no closure holds."""
    taken: dict[str, str] = field(default_factory=dict)
    """File taken away on purpose -> what of its naming and repair did not come out right; empty: nothing."""


class Subject:
    """One engine with its images, built when a run first needs them."""

    def __init__(self, engine: str, folder: Path, keep: str = "") -> None:
        self.keep = keep
        self.engine, self.folder, self.tally = engine, folder, Tally()
        self.service = models.service(engine)
        self.images: dict[str, builds.Built] = {}

    def image(self, kind: str) -> builds.Built:
        """Return the image of a model."""
        if kind not in self.images:
            print(f"building {self.engine} {kind}", flush=True)
            self.images[kind] = builds.build(self.engine, kind, self.folder, keep=self.keep)
        return self.images[kind]

    def expected(self, run: Run, prefix: Sequence[str] = ()) -> Outcome:
        """Live a run as the bare process."""
        image = self.image(run.start.model)
        return live(lambda run: builds.in_process(self.engine, image.model, run, prefix), run, image.served)

    def found(self, run: Run, root: Path | None = None) -> Outcome:
        """Live a run in the image's root, or in another tree."""
        image = self.image(run.start.model)
        return live(lambda run: builds.in_root(image, run, root), run, image.served)

    def judge(self, number: int) -> None:
        """Live one held-out run in both, and count what it comes to."""
        run = draw(self.service, number)
        self.tally.runs += 1
        traced = self.tally.runs % TRACED_EVERY == 1
        self.image(run.start.model)
        with ThreadPoolExecutor(1) as aside:  # nothing is timed, so that both may live at once
            found = aside.submit(self.found, run)
            expected = self._traced(run) if traced else self.expected(run)
            told = differences(expected, found.result())
        if not told:
            return
        again = self.expected(run)
        if differences(expected, again) or not (told := differences(again, outcome := self.found(run))):
            self.tally.unsteady.append(f"{self.engine} {number}")
            return
        self.tally.misses.append(f"{self.engine} {number}: {'; '.join(told)[:300]}")
        print(f"missed: {self.tally.misses[-1]}", flush=True)
        if why := self._repair(run, again, outcome):
            self.tally.unnamed.append(f"{self.engine} {number}: {why}")

    def _repair(self, run: Run, expected: Outcome, missed: Outcome) -> str:
        """Have the product name what was missing and repair the closure; return what did not come out right."""
        named, image = builds.repair(self.image(run.start.model), missed)
        self.images[run.start.model] = image
        if not named:
            return f"no file was named; the service wrote {missed.output[-300:]!r}"
        told = differences(expected, self.found(run))
        return f"{named} was named, and the run still differs: {told[0][:200]}" if told else ""

    def _traced(self, run: Run) -> Outcome:
        """Live a run as the bare process under a trace, and note what it opened that the closure does not have."""
        image = self.image(run.start.model)
        trace = self.folder / f"trace-{self.engine}-{run.number}"
        outcome = self.expected(run, ("strace", "-f", "-qq", "-y", "-I3", "-e", "trace=open,openat,openat2", "-o", str(trace)))
        self.tally.traced += 1
        self.tally.unseen |= unseen(trace.read_text(errors="replace").splitlines(), held(image))
        trace.unlink()
        return outcome

    def first(self, seed: int = 0) -> Run:
        """Return a run of a model whose image is there."""
        return next(run for n in itertools.count(seed) if (run := draw(self.service, n)).start.model in self.images)

    def take_away(self, seed: int, wanted: Sequence[str]) -> None:
        """Have images lack a needed file, one of each sort, as if it had not been seen; each must be named and come back."""
        run = self.first(seed)
        expected = self.expected(run)
        found = sorts(self.image(run.start.model))
        for sort, paths in ((sort, found[sort]) for sort in wanted):
            random.Random(f"{seed}/{sort}").shuffle(paths)
            for path in paths[:SEARCHED]:
                whole = self.image(run.start.model)
                lacking = builds.copy(whole)
                builds.forget(lacking, path)
                self.images[run.start.model] = lacking
                missed = self.found(run)
                if differences(expected, missed):
                    self.tally.taken[f"{sort}: {path}"] = self._repair(run, expected, missed)
                self.images[run.start.model] = whole
                shutil.rmtree(lacking.folder, ignore_errors=True)
                if f"{sort}: {path}" in self.tally.taken:
                    break

    def control(self) -> list[str]:
        """Return what the first run differs in where the root lacks what was only stat-ed."""
        run = self.first()
        tree = builds.opened_only(self.image(run.start.model), self.folder / f"opened-{self.engine}")
        return differences(self.expected(run), self.found(run, tree))


def run(options: Options) -> Result:
    """Build, live the held-out runs, take files away, and see the control miss."""
    builds.need_tools()
    wanted = models.LIGHT if options.quick else models.ENGINES
    lacking = {engine: why for engine in wanted if (why := builds.available(engine))}
    if len(lacking) == len(wanted):
        raise Skip("; ".join(lacking.values()))
    with builds.workshop() as folder:
        subjects = [Subject(engine, folder, "all" if options.quick else "") for engine in wanted if engine not in lacking]
        for number, subject in _schedule(subjects, options.quick):
            subject.judge(number)
        for subject in subjects[:1] if options.quick else subjects:
            subject.take_away(options.seed, SORTS[:1] if options.quick else SORTS)
        controls = {subject.engine: subject.control() for subject in subjects}
    return _result([subject.tally for subject in subjects], controls, lacking)


def _schedule(subjects: Sequence[Subject], quick: bool) -> Iterator[tuple[int, Subject]]:
    """Yield number and subject, the engines in turn."""
    ends_s = time.monotonic() + QUICK_S
    numbers = {subject.engine: _numbers(subject, quick) for subject in subjects}
    for turn in range(QUICK_RUNS if quick else RUNS):
        for subject in subjects:
            if quick and time.monotonic() > ends_s:
                return
            yield next(numbers[subject.engine]), subject
        if turn % 10 == 9:
            print(f"{turn + 1} runs of each engine", flush=True)


def _numbers(subject: Subject, quick: bool) -> Iterator[int]:
    return (n for n in itertools.count() if not quick or draw(subject.service, n).start.model == QUICK_KIND)


def _result(tallies: Sequence[Tally], controls: dict[str, list[str]], lacking: dict[str, str]) -> Result:
    runs = sum(tally.runs for tally in tallies)
    misses = [miss for tally in tallies for miss in tally.misses]
    unseen_files = sorted({path for tally in tallies for path in tally.unseen})
    unsteady = [name for tally in tallies for name in tally.unsteady]
    unnamed = [name for tally in tallies for name in tally.unnamed]
    taken = {path: why for tally in tallies for path, why in tally.taken.items()}
    per_1000 = 1000 * (len(misses) + len(unseen_files)) / runs
    spared = [engine for engine, told in controls.items() if not told]
    control = Control(
        name="closures of what was opened only",
        value=None,
        failed=not spared,
        how=f"{', '.join(spared)} did without" if spared else "; ".join(f"{e}: {told[0][:80]}" for e, told in controls.items()),
    )
    broken = [f"{len(misses) + len(unseen_files)} misses in {runs} runs"] if per_1000 > LIMIT_PER_1000 else []
    broken += [f"{len(unsteady)} of {runs} runs are unsteady"] if len(unsteady) > max(1.0, UNSTEADY_SHARE * runs) else []
    broken += [
        f"not named and repaired: {name}" for name in (*unnamed, *(f"{path}: {why}" for path, why in taken.items() if why))
    ]
    holds, why = judge(not broken, control)
    return Result(
        value=per_1000,
        spread=None,
        unit="misses per 1,000 runs",
        holds=holds,
        why=" | ".join(broken[:4]) or why,
        control=control,
        details={
            "runs": runs,
            "misses": misses,
            "unseen_files": unseen_files,
            "unsteady": unsteady,
            "taken_away": taken,
            "traced_runs": sum(tally.traced for tally in tallies),
            "left_out": lacking,
        },
    )


def held(image: builds.Built) -> set[str]:
    """Return the paths that an image's closure holds; the byte code of a source that it holds in another layout counts."""
    return {str(entry["path"]) for entry in image.lock["files"]}


def unseen(lines: Sequence[str], paths: set[str]) -> set[str]:
    """Return the files that a trace of ``strace -y`` shows to be opened for reading, and that are none of these paths."""
    found = set()
    for line in lines:
        if (match := _OPENED.match(line)) and not _MADE.search(match[1]):
            path = match[2]
            source = re.sub(r"__pycache__/([^/]+)\.cpython-\d+\.pyc$", r"\1.py", path)
            ruled_out = _GONE.search(path) or RULES.left_out(path)
            if not ruled_out and not {path, source, f"{source}c"} & paths and Path(path).is_file():
                found.add(path)
    return found


def sorts(image: builds.Built) -> dict[str, list[str]]:
    """Return files of a root that may be needed, by sort: modules, shared objects, those that were only stat-ed."""
    found: dict[str, list[str]] = {sort: [] for sort in SORTS}
    for entry in image.lock["files"]:
        path = str(entry["path"])
        if not (image.root / path.lstrip("/")).is_file() and (image.root / f"{path}c".lstrip("/")).is_file():
            path += "c"  # the byte code lies beside where the source was
        if not (image.root / path.lstrip("/")).is_file() or (image.root / path.lstrip("/")).is_symlink():
            continue
        kinds = {reason[0] for reason in entry.get("reasons", ())}
        if kinds == {"statted"}:
            found["only stat-ed"].append(path)
        elif "opened" in kinds and path.endswith((".py", ".pyc")) and not path.startswith(str(builds.PROGRAMS)):
            found["module"].append(path)
        elif "opened" in kinds and ".so" in path:
            found["shared object"].append(path)
    return found
