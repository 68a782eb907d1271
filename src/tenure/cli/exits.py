"""The one table from error to exit code. Not here: the errors' meaning (`tenure.errors`)."""

from __future__ import annotations

from collections.abc import Mapping

from tenure import errors

OK = 0
JOB_FAILED = 1
WRONG_INPUT = 2
REFUSED = 3
NOT_FOUND = 4
CONFLICT = 5
UNAVAILABLE = 6
MISSING_EXTRA = 7
CORRUPT_DATA = 8
INTERNAL = 70
INTERRUPTED = 130

MEANINGS: Mapping[int, str] = {
    OK: "done",
    JOB_FAILED: "a job that Tenure ran failed, `doctor` found something that keeps jobs from running, or `bench load` was "
    "INVALID or did not prove its goal met",
    WRONG_INPUT: "wrong input: job file, option or value; nothing was started",
    REFUSED: "refused: no node can hold it, a quota, or the queue's time ran out",
    NOT_FOUND: "the named run, lease or file does not exist",
    CONFLICT: "the state changed meanwhile, or the change is not allowed in it",
    UNAVAILABLE: "a process or machine did not answer in time; trying again may help",
    MISSING_EXTRA: "an optional library is missing; the message says what to install",
    CORRUPT_DATA: "what was read is not what was written",
    INTERNAL: "Tenure broke one of its own rules: please report it (TENURE_DEBUG=1 shows where)",
    INTERRUPTED: "Ctrl-C or SIGTERM; what was started has been ended",
}
"""Exit code -> what it tells the caller."""

CODES: Mapping[type[errors.TenureError], int] = {
    errors.JobFailed: JOB_FAILED,
    errors.SpecError: WRONG_INPUT,
    errors.Refused: REFUSED,
    errors.NotFound: NOT_FOUND,
    errors.Conflict: CONFLICT,
    errors.Unavailable: UNAVAILABLE,
    errors.MissingExtra: MISSING_EXTRA,
    errors.CorruptData: CORRUPT_DATA,
    errors.InternalError: INTERNAL,
}
"""Error class -> exit code; a subclass has its base's."""


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error: the nearest base in `CODES`, 130 for Ctrl-C, 70 for anything unforeseen."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    for cls in type(error).__mro__:
        if cls in CODES:
            return CODES[cls]
    return INTERNAL
