"""What attempts to get out of a lease aim at: services of this machine, another tenant's server, a secret. See `attacks`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.docker_engine import Engine

SERVER = (
    "import http.server, os\n"
    "os.chdir(os.environ['TENURE_WORKER_DIR'])\n"
    "server = http.server.HTTPServer(('0.0.0.0', 7000), http.server.SimpleHTTPRequestHandler)\n"
    "print('listening', flush=True)\nserver.serve_forever()"
)


@contextlib.contextmanager
def services_of_this_machine() -> Iterator[dict[str, Any]]:
    """Listen where a service of this machine may: everywhere, on loopback, over UDP, on an abstract socket."""
    everywhere = socket.create_server(("0.0.0.0", 0))
    loopback = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("0.0.0.0", 0))
    abstract = socket.socket(socket.AF_UNIX)
    name = f"tenure-attack-{os.getpid()}"
    abstract.bind(b"\0" + name.encode())
    abstract.listen()

    def answer(line):
        with contextlib.suppress(OSError):
            while True:
                if line.type == socket.SOCK_DGRAM:
                    data, who = line.recvfrom(100)
                    if who is None:
                        return
                    line.sendto(data, who)
                else:
                    client, _ = line.accept()
                    with client:
                        client.sendall(b"HTTP/1.0 200 OK\r\n\r\nsecret of this machine")

    lines = (everywhere, loopback, udp, abstract)
    for line in lines:
        threading.Thread(target=answer, args=(line,), daemon=True).start()
    try:
        yield {
            "host_port": everywhere.getsockname()[1],
            "loopback_port": loopback.getsockname()[1],
            "udp_port": udp.getsockname()[1],
            "abstract": name,
        }
    finally:
        for line in lines:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()


def address_of_this_machine() -> str:
    """Return the address by which others would reach it; of loopback when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        try:
            line.connect(("192.0.2.77", 9))
        except OSError:
            return "127.0.0.2"
        return line.getsockname()[0]


def targets_of(docker: Engine, name: str, folder: Path, victim: str) -> dict[str, Any]:
    """Return what attempts aim at, given the container of another tenant and the network of ours."""
    ours = json.loads(docker.ask("GET", f"/networks/{name}")[1])["IPAM"]["Config"][0]["Gateway"]
    theirs = next(iter(docker.inspect(victim)["NetworkSettings"]["Networks"].values()))
    secret = folder / "secret"
    secret.write_text("a secret of this machine")
    disk = os.stat("/").st_dev
    return {
        "socket": str(docker.socket),
        "gateway": ours,
        "other_address": theirs["IPAddress"],
        "other_gateway": theirs["Gateway"],
        "other_name": victim,
        "other_port": 7000,
        "host_address": address_of_this_machine(),
        "secret_path": str(secret),
        "secret": secret.read_text(),
        "account": "daemon:x:1:",
        "process": os.getpid(),
        "process_word": Path("/proc/self/cmdline").read_text().split("\0")[0],
        "disk": [os.major(disk), os.minor(disk)],
    }
