"""How a run shows itself while it goes on: bars on a terminal, one plain line per step elsewhere, nothing with --json.

Each class here fits the `Display` protocol that the flow reports to. What is shown of other people's text (names, closing
lines) is stripped of control characters first: a job's name cannot move the cursor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from tenure.cli.output import clean, say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SAY_EVERY_S = 30.0


class SilentDisplay:
    """Shows nothing: the result is printed as JSON at the end. Warnings go to `err`."""

    def __init__(self, err: TextIO) -> None:
        self._err = err

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def stage_started(self, stage: str, step: str, text: str) -> None:
        """Take note that a step of a stage begins."""

    def progress(self, text: str, done: float | None = None) -> None:
        """Take note of how far the present step is. done: share from 0 to 1, None when nobody can tell."""

    def step_done(self, stage: str, step: str, closing_line: str) -> None:
        """Take note that a step ended well."""

    def warn(self, text: str) -> None:
        """Tell what the user should know though the run goes on."""
        say(f"warning: {clean(text)}", self._err)


class PlainDisplay(SilentDisplay):
    """One line per ended step, with the seconds since the beginning; and one now and then while a step takes long."""

    def __init__(
        self,
        out: TextIO,
        err: TextIO,
        *,
        say_every_s: float = SAY_EVERY_S,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(err)
        self._out = out
        self._say_every_s = say_every_s
        self._monotonic_s = monotonic_s
        self._began_s = self._said_s = monotonic_s()
        self._now = ""

    def stage_started(self, stage: str, step: str, text: str) -> None:
        """Keep the heading for what is told of the step."""
        self._now, self._said_s = _heading(stage, step), self._monotonic_s()

    def progress(self, text: str, done: float | None = None) -> None:
        """Print how far the step is, at most every `say_every_s`: a log shall not grow with every round."""
        if self._now and self._monotonic_s() - self._said_s >= self._say_every_s:
            self._say(self._now, text)

    def step_done(self, stage: str, step: str, closing_line: str) -> None:
        """Print the step's closing line."""
        self._say(_heading(stage, step), closing_line)

    def _say(self, heading: str, text: str) -> None:
        self._said_s = self._monotonic_s()
        say(f"[{self._said_s - self._began_s:6.1f} s] {heading}: {clean(text)}", self._out)


class RichDisplay(SilentDisplay):
    """A spinner and a bar for the present step, and under it what happens now; each closing line stays above it."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        super().__init__(err)
        # rich is imported here and not above: it would double the time of `tenure --help`
        from rich.console import Console, RenderableType
        from rich.padding import Padding
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.text import Text

        class Above(Progress):
            """The bar, and below it the text: beside it, a terminal of usual width would cut the text off."""

            def get_renderables(self) -> Iterator[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                for task in self.tasks:
                    yield Padding(Text(task.description), (0, 0, 0, 2))

        self._progress: Progress = Above(
            SpinnerColumn(),
            TextColumn("{task.fields[heading]}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=Console(file=out, highlight=False),
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_task()
        self._progress.stop()

    def stage_started(self, stage: str, step: str, text: str) -> None:
        """Begin a bar for the step."""
        self._end_task()
        self._task = self._progress.add_task(clean(text), total=None, heading=_heading(stage, step))

    def progress(self, text: str, done: float | None = None) -> None:
        """Move the bar, or let it pulse when nobody can tell how far the step is."""
        if self._task is None:
            return
        if done is None:
            self._progress.update(self._task, description=clean(text))
        else:
            self._progress.update(self._task, description=clean(text), total=1.0, completed=min(max(done, 0.0), 1.0))

    def step_done(self, stage: str, step: str, closing_line: str) -> None:
        """Replace the bar by the closing line."""
        from rich.text import Text

        self._end_task()
        line = Text.assemble(("✓ ", "green"), (_heading(stage, step), "bold"), "  ", clean(closing_line))
        self._progress.console.print(line, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print the warning above the bar."""
        from rich.text import Text

        self._progress.console.print(Text.assemble(("! ", "yellow"), clean(text)), soft_wrap=True)

    def _end_task(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


def _heading(stage: str, step: str) -> str:
    return " ".join(clean(part) for part in (stage, step) if part)


def make_display(out: TextIO, err: TextIO, *, json: bool, say_every_s: float = SAY_EVERY_S) -> SilentDisplay:
    """Return the display that fits: silent with --json, live on a terminal, plain otherwise.

    say_every_s: how often a plain display tells of a step that takes long.
    """
    if json:
        return SilentDisplay(err)
    return RichDisplay(out, err) if out.isatty() else PlainDisplay(out, err, say_every_s=say_every_s)
