"""A PostgreSQL server of one's own for tests and benchmarks: made in a temporary folder, gone with whoever made it.

It does not depend on a cluster that the package may have started, and touches none. As root it runs as the system's user
``postgres`` (PostgreSQL refuses root), otherwise as the present user.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PASSWORD = "s3cret/word"
START_MAX_S = 60.0


def why_absent() -> str:
    """Return why no server can be started here; empty when one can."""
    if binaries() is None:
        return "no PostgreSQL server here (Debian, as root: apt-get install postgresql; tools/postgres.sh does it)"
    if os.geteuid() == 0 and _server_user() is None:
        return "PostgreSQL refuses to run as root, and there is no user postgres"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return 'no psycopg here (pip install "tenure[postgres]")'
    return ""


def binaries() -> Path | None:
    """Return the folder of the newest server's programs, None when there is none."""
    found = [Path(name).parent for name in [shutil.which("initdb")] if name]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -float(path.parent.name))
    return next((path for path in found if (path / "initdb").exists() and (path / "postgres").exists()), None)


def _server_user() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None


class Server:
    """A running server. Over its socket everybody is let in; over TCP the user needs `PASSWORD`."""

    def __init__(self, folder: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.folder, self.port, self.process = folder, port, process
        self._numbers = itertools.count(1)

    def url(self, database: str = "postgres") -> str:
        """Return a database's URL over the socket."""
        return f"postgresql://postgres@/{database}?host={self.folder}&port={self.port}"

    def tcp_url(self, database: str = "postgres", *, password: str = "") -> str:
        """Return a database's URL over TCP."""
        return f"postgresql://postgres{':' + password.replace('/', '%2F') if password else ''}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple]:
        """Run one statement outside any transaction; return its rows, none when it gives none."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def new_database(self) -> str:
        """Make an empty database and return its URL."""
        name = f"ledger{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def new_schema(self) -> str:
        """Make an empty schema, which is as good as a database and takes no time, and return the URL that leads to it."""
        name = f"ledger{next(self._numbers)}"
        self.execute(f"CREATE SCHEMA {name}")
        return f"{self.url()}&options=-csearch_path%3D{name}"


@contextlib.contextmanager
def running(*, settings: dict[str, str] | None = None) -> Iterator[Server]:
    """Give a new server until the end. settings: of postgresql.conf, e.g. ``fsync``; the defaults are those of a real one."""
    programs = binaries()
    assert programs is not None, why_absent()
    user = _server_user() if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="tp-", dir="/tmp"))  # short: its socket's path must fit 107 bytes
    who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)
    secret = folder / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    data = folder / "data"
    try:
        made = subprocess.run(
            [programs / "initdb", "-D", data, "-U", "postgres", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8",
             "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={secret}"],
            capture_output=True, text=True, cwd="/", **who,
        )  # fmt: skip
        assert made.returncode == 0, made.stdout + made.stderr
        with _started(programs, folder, data, settings or {}, who) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _started(programs: Path, folder: Path, data: Path, settings: dict[str, str], who: dict) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wanted = {"listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": str(folder), **settings}
    argv = [str(programs / "postgres"), "-D", str(data), *(word for pair in wanted.items() for word in ("-c", "=".join(pair)))]
    if setpriv := shutil.which("setpriv"):  # whoever made it may be killed: the server goes too
        argv = [setpriv, "--pdeathsig", "QUIT", *argv]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True, **who
        )
    try:
        server = Server(folder, port, process)
        end_s = time.monotonic() + START_MAX_S
        while not _answers(server):
            ended = process.poll() is not None or time.monotonic() > end_s
            assert not ended, (folder / "log").read_text()
            time.sleep(0.05)
        yield server
    finally:
        process.send_signal(signal.SIGQUIT)  # the immediate shutdown: nobody wants the files any more
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(server: Server) -> bool:
    import psycopg

    try:
        server.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True
