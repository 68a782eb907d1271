"""Becomes a command in the root directory of an image, as the process runtime starts it, without a lease around it.

`python -I in_root.py ROOT WORKDIR COMMAND…`, with the environment that the command is to have. BENCH_PROFILE, taken out of it,
names a profile of system calls to run behind.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from tenure.runtimes.become import filter_calls
from tenure.runtimes.rooted import Root, enter_root
from tenure.runtimes.seccomp import compiled, read_profile


def main(root, workdir, *argv):
    """Enter, then exec; does not return."""
    profile = os.environ.pop("BENCH_PROFILE", "")
    program = compiled(read_profile(profile, whose="this run")) if profile else b""
    enter_root(Root(path=root, workdir=workdir))
    filter_calls(program)
    os.execvpe(argv[0], argv, os.environ)


if __name__ == "__main__":
    main(*sys.argv[1:])
