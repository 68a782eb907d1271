"""The base image of one node, made beside what the node does, by a process of its own, and told of meanwhile.

For: a first container that does not wait in an order's time limit for 90 MB to be gathered and sent to the engine. Begun when a
broker means the node to stay, or by the first container that wants it; whoever asks before it is there is told how far it is.
Not for: what the image holds (`images`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time

from tenure.errors import TenureError, Unavailable
from tenure.runtimes.become import die_with_parent
from tenure.runtimes.container_engine import Engine
from tenure.runtimes.images import ensure_base_image

MAX_S = 600.0
"""How long making it may take."""
_NICE = 10
_MADE = "made "
_AGAIN_S = 5.0
"""After one that failed, how long until it is tried again for those who ask."""


class BaseImage:
    """Safe to share between threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._name = ""
        self._step = ""
        self._failed = ""
        self._thread: threading.Thread | None = None
        self._begun_s = self._failed_s = float("-inf")

    def begin(self, engine_path: str) -> None:
        """Have it made, unless it is, or is being. Returns at once."""
        with self._changed:
            if self._name or self._thread is not None:
                return
            self._step, self._failed, self._begun_s = "beginning", "", time.monotonic()
            self._thread = threading.Thread(target=self._make, args=(engine_path,), name="base image", daemon=True)
            self._thread.start()

    def name(self, engine_path: str, *, wait_s: float) -> str:
        """Return its name, after making it where it is missing.

        Raises Unavailable when it is not there after `wait_s`, with how far it is, or why it cannot be made.
        """
        end_s = time.monotonic() + wait_s
        if time.monotonic() - self._failed_s > _AGAIN_S:
            self.begin(engine_path)
        with self._changed:
            while not self._name and self._thread is not None and (left_s := end_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            if self._name:
                return self._name
            if self._thread is None:
                raise Unavailable(f"the base image of containers cannot be made: {self._failed}")
            raise Unavailable(f"{self._told()}; the container is started once it is there")

    def forget(self) -> None:
        """Have it looked for again, and made where somebody has removed it."""
        with self._changed:
            self._name = ""

    def describe(self) -> str:
        """Return how far it is, for people; empty when nothing is under way."""
        with self._changed:
            if self._thread is not None:
                return self._told()
            return f"the base image cannot be made: {self._failed}" if self._failed else ""

    def _told(self) -> str:
        return f"the base image of containers is being made ({self._step}; {time.monotonic() - self._begun_s:.0f} s so far)"

    def _make(self, engine_path: str) -> None:
        name, failed = "", ""
        try:
            name, failed = self._run(engine_path)
        except OSError as error:
            failed = str(error)
        finally:
            with self._changed:
                self._name, self._failed, self._thread = name, "" if name else failed or "its maker died", None
                self._failed_s = float("-inf") if name else time.monotonic()
                self._changed.notify_all()

    def _run(self, engine_path: str) -> tuple[str, str]:
        """Return the image's name, or why there is none."""
        argv = [sys.executable, "-P", "-m", "tenure.runtimes.base_image", engine_path]
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        ) as process:
            late = threading.Timer(MAX_S, process.kill)
            late.start()
            last = ""
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    last = line.strip() or last
                    if last.startswith(_MADE):
                        return last.removeprefix(_MADE), ""
                    with self._changed:
                        self._step = last[:200]
            finally:
                late.cancel()
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        return "", last


def main(argv: list[str]) -> int:
    """Make the base image in the engine whose socket is the first argument; print each step, at last its name."""
    die_with_parent()
    os.nice(_NICE)
    try:
        print(_MADE + ensure_base_image(Engine(argv[0]), told=lambda step: print(step, flush=True)), flush=True)  # noqa: T201
    except (TenureError, OSError) as error:
        print(error, flush=True)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
