"""A home: the folder of all state of one broker. Whose it is, who may use it, and where its sockets lie.

A home serves its owner alone, or, once root has shared it (`share`), every user of the machine: root's broker tells by the
socket who asks (`broker.tenancy`). What belongs to whom in a shared home:

    home/                 root, 0711: entered by all, listed by none
      shared              root: the mark
      socket-dir          root, 0644: names a folder of root's in which broker.sock is open to all
      runs/, homes/       root, 0711; each folder below belongs to its tenant, 0700
      everything else     root alone

Not here: calls over the sockets (`sockets`).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import tempfile
import threading
from pathlib import Path

from tenure.errors import Conflict, CorruptData, Refused, SpecError, Unavailable

SYSTEM_HOME = Path("/var/lib/tenure")
"""The home that root shares unless told otherwise, and that everybody uses who names none, once it is shared."""
MARK = "shared"
_ENTERED = ("runs", "homes", "trash")
"""Folders that tenants, or those who act for them, pass through."""
_SOCKETS_BELOW = Path("/run")


def is_shared(home: Path) -> bool:
    """Whether root has this home serve every user: only root can have put the mark there, and only root can write beside it."""
    try:
        folder, mark = home.stat(), (home / MARK).lstat()
    except OSError:
        return False
    return folder.st_uid == mark.st_uid == 0 and stat.S_ISREG(mark.st_mode) and not folder.st_mode & 0o022


def is_guest(home: Path) -> bool:
    """Whether we are one of the users that another's shared home serves."""
    return is_shared(home) and home.stat().st_uid != os.geteuid()


def check_owner(home: Path) -> None:
    """Raise SpecError when a home exists and belongs to another user, for root as for everybody.

    Whatever runs in a home runs with the rights of whoever started its broker (docs/decisions/0008).
    """
    try:
        owner = home.stat().st_uid
    except FileNotFoundError:
        return
    if owner != os.geteuid():
        raise SpecError(
            f"the home {home} belongs to user {user_name(owner)}; this is user {user_name(os.geteuid())}. A home serves its "
            "owner alone: what runs there runs with its owner's rights, and what you wrote there the owner could not change. "
            "Set TENURE_HOME, or --home, to a folder of your own; the machine is shared out between homes all the same."
        )


def check_user(home: Path) -> None:
    """Raise SpecError when a home exists and serves another user alone."""
    if not is_shared(home):
        check_owner(home)


def check_own_run(folder: Path) -> None:
    """Raise Refused for a run's folder of another user: we would write there with our rights, wherever its links lead."""
    with contextlib.suppress(FileNotFoundError):
        if (uid := folder.lstat().st_uid) != os.geteuid():
            raise Refused(f"the run in {folder} is of user {user_name(uid)}: do it as that user, with sudo -u")


def user_name(uid: int) -> str:
    """Return a user for people: name and number."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


def share(home: Path) -> None:
    """Have a home serve every user of this machine from the next broker on. Doing it again changes nothing.

    Raises Refused for others than root, Conflict for a home that others could replace.
    """
    if os.geteuid() != 0:
        raise Refused(
            "only root can share a home with all users of a machine: what runs there is to run with each tenant's own rights. "
            "Ask root for it, or leave --shared out: a home of your own needs no rights."
        )
    home.mkdir(parents=True, exist_ok=True, mode=0o711)
    check_owner(home)
    for folder in home.resolve().parents:
        info = folder.stat()
        if info.st_uid != 0 or (info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX):
            raise Conflict(
                f"the home {home} cannot be shared: others than root can write {folder} and could put another folder in its "
                f"place. Share one such as {SYSTEM_HOME}."
            )
    was_shared = is_shared(home)
    home.chmod(0o711)
    for name in _ENTERED:
        (home / name).mkdir(exist_ok=True)
    if not was_shared:
        for entry in [*os.scandir(home), *os.scandir(home / "runs"), *os.scandir(home / "homes")]:
            if not entry.is_symlink():
                os.chmod(entry.path, 0o700 if entry.is_dir() else 0o600)
        with contextlib.suppress(FileNotFoundError):
            (home / "socket-dir").unlink()  # it was made where others can make a folder of that name after a reboot
    for name in _ENTERED:
        (home / name).chmod(0o711)
    (home / MARK).touch(mode=0o644)


def socket_dir(home: Path) -> Path:
    """Return the folder of this home's sockets; made, private to its owner, and noted in the home when there is none.

    Of a shared home it belongs to root and can be entered by all. Two processes that ask at once get the same folder: the
    note is published create-exclusively. A folder that vanished (a reboot emptied it) is made again under its old name.
    Raises Unavailable when it is not there to be used, also where somebody else has made one of that name.
    """
    shared = is_shared(home)
    owner = home.stat().st_uid if shared else os.geteuid()
    if owner == os.geteuid():
        home.mkdir(parents=True, exist_ok=True)
    note = home / "socket-dir"
    for _ in range(10):
        try:
            folder = Path(note.read_text().strip())
        except FileNotFoundError:
            if owner != os.geteuid():
                raise Unavailable(f"the home {home} has no broker yet") from None
            _publish(home, note, shared=shared)
            continue
        if not folder.is_absolute():
            raise CorruptData(f"{note} should hold an absolute folder; found {str(folder)!r}. Remove the file and try again.")
        if owner == os.geteuid():
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700, parents=True)
                if shared:
                    folder.chmod(0o711)  # whatever the umask: a broker that others ask keeps its own files to itself
        try:
            found = folder.lstat()
        except FileNotFoundError:
            raise Unavailable(f"the home {home} has no broker now") from None
        if found.st_uid != owner or not stat.S_ISDIR(found.st_mode):
            raise Unavailable(
                f"the socket folder {folder} of home {home} belongs to another user. Once no broker of the home is up, its "
                f"owner can remove {note} to have a new one."
            )
        return folder
    raise Unavailable(f"could not agree on a socket folder for {home}")


def _publish(home: Path, note: Path, *, shared: bool) -> None:
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    if shared and os.access(_SOCKETS_BELOW, os.W_OK):
        base = str(_SOCKETS_BELOW)  # where root alone can make a folder, also after a reboot
    made = tempfile.mkdtemp(prefix="tenure-", dir=base if os.access(base, os.W_OK) else tempfile.gettempdir())
    if shared:
        os.chmod(made, 0o711)
    draft = home / f".socket-dir.{os.getpid()}.{threading.get_ident()}"
    draft.write_text(made)
    draft.chmod(0o644)
    try:
        os.link(draft, note)
    except FileExistsError:
        os.rmdir(made)
    finally:
        draft.unlink()
