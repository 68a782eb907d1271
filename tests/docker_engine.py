"""A Docker Engine of one's own for tests and benchmarks: in a temporary folder, gone with whoever made it.

It does not depend on an engine that the machine may run, and touches none: its own socket, data and runtime folders, no bridge
of its own. What it changes of the machine's packet filter is put back at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

START_MAX_S = 60.0
END_MAX_S = 30.0
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def why_absent() -> str:
    """Return why no engine can be started here; empty when nothing speaks against trying."""
    if os.geteuid() != 0:
        return "a Docker Engine of one's own needs root"
    for program in ("dockerd", "containerd", "iptables"):
        if _find(program) is None:
            return f"no {program} here (Debian, as root: apt-get install docker.io iptables; tools/docker.sh does it)"
    return ""


def why_no_container(engine: Engine) -> str:
    """Return why an engine that runs cannot run a container here, as inside other containers; empty when it can."""
    from tenure.runtimes.container_engine import Engine as Client
    from tenure.runtimes.images import ensure_base_image

    image = ensure_base_image(Client(str(engine.socket)))
    status, said = engine.ask("POST", "/containers/create?name=probe", {"Image": image, "Cmd": ["true"]})
    if status == 201:
        status, said = engine.ask("POST", "/containers/probe/start")
    engine.ask("DELETE", "/containers/probe?force=1")
    return (
        "" if status == 204 else f"a Docker Engine runs here, but no container: {said.decode(errors='replace').strip()[:300]}"
    )


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


class CannotStart(Exception):
    """The engine's programs are here, and it does not come up: what it said last."""


class Engine:
    """An engine with folders of its own."""

    def __init__(self, folder: Path, *, live_restore: bool) -> None:
        self.folder, self.live_restore = folder, live_restore
        self.socket = folder / "docker.sock"
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and return once it answers. Raises CannotStart."""
        argv = [_find("dockerd") or "dockerd", "--host", f"unix://{self.socket}", "--data-root", f"{self.folder}/data"]
        argv += ["--exec-root", f"{self.folder}/run", "--pidfile", f"{self.folder}/pid", "--bridge", "none"]
        argv += ["--live-restore"] if self.live_restore else []
        if setpriv := shutil.which("setpriv"):  # whoever made it may be killed: the engine goes too
            argv = [setpriv, "--pdeathsig", "TERM", *argv]
        environment = dict(os.environ, PATH=f"/usr/sbin:/sbin:{os.environ.get('PATH', os.defpath)}")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        end_s = time.monotonic() + START_MAX_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > end_s:
                raise CannotStart(self.said())
            time.sleep(0.05)

    def answers(self) -> bool:
        """Return whether it answers its ping."""
        with contextlib.suppress(OSError):
            return self.ask("GET", "/_ping")[0] == 200
        return False

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Return status and body of one call of its API: the tests' own way to it, independent of the product's."""
        import http.client
        import socket

        class Connection(http.client.HTTPConnection):
            def connect(connection) -> None:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(30.0)
                connection.sock.connect(str(self.socket))

        connection = Connection("localhost")
        try:
            raw = isinstance(body, bytes)
            text = body if raw or body is None else json.dumps(body)
            kind = "application/x-tar" if raw else "application/json"
            connection.request(method, path, text, {"Content-Type": kind} if text else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def containers(self) -> list[dict]:
        """Return all its containers, ended ones included, as it lists them."""
        return json.loads(self.ask("GET", "/containers/json?all=1")[1])

    def inspect(self, container: str) -> dict:
        """Return what it says of one container."""
        return json.loads(self.ask("GET", f"/containers/{container}/json")[1])

    def load(self, image: bytes) -> None:
        """Take over an image that another engine gave."""
        status, said = self.ask("POST", "/images/load?quiet=1", image)
        assert status == 200, said

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the engine itself, and its containerd if that stays; with live-restore containers go on."""
        assert self.process is not None
        self.process.send_signal(number)
        try:
            self.process.wait(END_MAX_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._kill(b"containerd")
        (self.folder / "run/containerd/containerd.pid").unlink(
            missing_ok=True
        )  # else one that waits to be reaped is waited for

    def _kill(self, *programs: bytes) -> None:
        for pid in _mentioning(str(self.folder), programs):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def restart(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the engine and start it again."""
        self.end(number)
        self.start()

    def said(self) -> str:
        """Return its last words."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "; ".join([line for line in lines if "level=fatal" in line or "failed to start" in line][-2:] or lines[-2:])[
            -400:
        ]

    def close(self) -> None:
        """Remove every container and network, end the engine, and whatever of it still runs."""
        with contextlib.suppress(OSError, ValueError):
            if not self.answers():
                self.restart(signal.SIGKILL)
            for container in self.containers():
                self.ask("DELETE", f"/containers/{container['Id']}?force=1&v=1")
            for network in json.loads(self.ask("GET", "/networks")[1]):
                if network["Name"] not in ("host", "none", "bridge"):
                    self.ask("DELETE", f"/networks/{network['Id']}")
        self.end()
        self._kill(b"containerd-shim-runc-v2")
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[1].startswith(str(self.folder)):
                subprocess.run(["umount", "-l", line.split()[1]], capture_output=True, check=False)


def _mentioning(word: str, programs: tuple[bytes, ...]) -> list[int]:
    """Return the processes of these programs whose command line has a word: those of an engine name its folder."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
                if word.encode() in line and os.path.basename(line.split(b"\0")[0]) in programs:
                    found.append(int(entry))
    return found


def _engines() -> bool:
    """Return whether an engine runs on this machine, ours or another."""
    return bool(_mentioning("", (b"dockerd",)))


def _iptables(program: str, *words: str) -> str:
    found = _find(program) or program
    return subprocess.run([found, "-w", "5", *words], capture_output=True, text=True, check=False).stdout


def _has_chains() -> bool:
    return "DOCKER" in _iptables("iptables", "-S")


def _remove_rules() -> None:
    """Take out of the packet filter what an engine and its tenants' networks put there, and nothing else."""
    for program, table in (("iptables", "filter"), ("iptables", "nat"), ("ip6tables", "filter")):
        lines = _iptables(program, "-t", table, "-S").splitlines()
        for line in lines:
            if line.startswith("-A") and ("DOCKER" in line or " tn-" in line):
                _iptables(program, "-t", table, "-D", *line.split()[1:])
        for chain in (line.split()[1] for line in lines if line.startswith("-N DOCKER")):
            _iptables(program, "-t", table, "-F", chain)
            _iptables(program, "-t", table, "-X", chain)


def _remove_bridges() -> None:
    """Remove bridges of tenants' networks whose engine was killed before it could."""
    for name in os.listdir("/sys/class/net"):
        if name.startswith("tn-") and Path(f"/sys/class/net/{name}/bridge").exists():
            subprocess.run([_find("ip") or "ip", "link", "del", name], capture_output=True, check=False)


@contextlib.contextmanager
def running(*, live_restore: bool = True) -> Iterator[Engine]:
    """Give a new engine until the end. Raises CannotStart."""
    forward = _FORWARD.read_text()
    others = _has_chains()
    with contextlib.suppress(OSError):
        _FORWARD.write_text("1")  # an engine that finds it so leaves the machine's policy on forwarding alone
    folder = Path(tempfile.mkdtemp(prefix="td-", dir="/tmp"))  # short: its socket's path must fit 107 bytes
    engine = Engine(folder, live_restore=live_restore)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()
        if not others and not _engines():
            _remove_rules()
            _remove_bridges()
            with contextlib.suppress(OSError):
                _FORWARD.write_text(forward)
        shutil.rmtree(folder, ignore_errors=True)
