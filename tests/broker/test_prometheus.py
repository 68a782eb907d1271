"""A real Prometheus reads a real broker; a dashboard asks it nothing that is not there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tenure.broker.client import BrokerClient, connect, start_broker
from tenure.broker.metrics import METRICS
from tenure.errors import Unavailable
from tenure.jobs import Command
from tenure.resources import Envelope
from tenure.wire import GangMember, RequestGang

from .test_metrics import free_port

MIB = 1 << 20
DASHBOARD = Path("docs/metering-dashboard.json")
missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
needs_prometheus = [
    pytest.mark.real,
    pytest.mark.prometheus,
    pytest.mark.skipif(bool(missing), reason=f"not here: {', '.join(missing)} (tools/prometheus.sh gets Debian's package)"),
]


@contextlib.contextmanager
def prometheus(folder: Path, target: int) -> Iterator[str]:
    """Give the address of a Prometheus that reads a port of this machine five times a second, until the end."""
    config, port = folder / "prometheus.yml", free_port()
    scrape = {"job_name": "tenure", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
    config.write_text(json.dumps({"global": {"scrape_interval": "200ms"}, "scrape_configs": [scrape]}))  # JSON is YAML
    where = ["--config.file", config, "--storage.tsdb.path", folder / "data", "--web.listen-address", f"127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["prometheus", *where], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def query(address: str, text: str) -> list[dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{address}/api/v1/query?{urllib.parse.urlencode({'query': text})}", timeout=5) as answer:
            return json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 503:  # it is only starting
                return []
            raise AssertionError(f"{text}: {error.read().decode()}") from error
    except (urllib.error.URLError, ConnectionError):
        return []


def wait_for(address: str, text: str, *, limit_s: float = 40.0) -> list[dict[str, Any]]:
    """Return what a query gives once it gives anything."""
    end_s = time.monotonic() + limit_s
    while not (found := query(address, text)):
        assert time.monotonic() < end_s, f"{text} gave nothing in {limit_s} s"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[BrokerClient, int, str]]:
    """Give a broker with one busy lease, the port of its metrics, and a Prometheus that reads it."""
    home, port = tmp_path_factory.mktemp("metrics") / "home", free_port()
    start_broker(home, persistent=True)
    with connect(home) as client:
        client.add_node("local", cpus=0.6, memory_bytes=200 * MIB, metrics_port=port)
        envelope = Envelope(cpus=0.5, memory_bytes=64 * MIB, slot_s=100.0, total_s=100.0)
        busy = Command(argv=("sh", "-c", "while :; do :; done"))
        member = GangMember(worker=0, envelope=envelope, command=busy)
        (lease,) = client.request_gang(
            RequestGang(gang_id="g", run_id="r", stage="s", tenant="ada", members=(member,), queue_s=20.0)
        )
        client.wait_leases((lease.id,), until="active", timeout_s=20.0)
        with prometheus(home.parent, port) as address:
            yield client, port, address
    with contextlib.suppress(Unavailable), connect(home, start=False) as client:
        client.shutdown()


def apply(marks):
    def marked(test):
        for mark in marks:
            test = mark(test)
        return test

    return marked


@apply(needs_prometheus)
def test_prometheus_reads_leases_nodes_and_broker(measured) -> None:
    client, _, address = measured
    (lease,) = client.leases(live=True)
    used = f'tenure_lease_cpu_seconds_total{{lease="{lease.id}"}}'
    (rate,) = wait_for(address, f"rate({used}[5s]) > 0.2")
    assert rate["metric"]["tenant"] == "ada"
    # Two scrapes may lie closer together than the readings they show; over its whole life nothing is extrapolated.
    (share,) = wait_for(address, f"{used} / (time() - {lease.starts_at_s!r}) > 0.1")
    assert float(share["value"][1]) <= 0.7, "it may use half a core"
    (up,) = wait_for(address, 'up{job="tenure"}')
    assert up["value"][1] == "1"
    (held,) = wait_for(address, "tenure_node_held_cpus / tenure_node_cpus")
    assert float(held["value"][1]) == pytest.approx(0.5 / 0.6)


@apply(needs_prometheus)
def test_promtool_finds_nothing_wrong_with_the_metrics(measured) -> None:
    _, port, _ = measured
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read()
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=20)
    assert checked.returncode == 0, checked.stderr.decode()


@apply(needs_prometheus)
def test_every_panel_of_the_dashboard_is_a_query_that_prometheus_answers(measured) -> None:
    _, _, address = measured
    wait_for(address, "tenure_leases")
    for expression in expressions():
        query(address, expression)


@apply(needs_prometheus)
def test_a_broker_that_died_has_its_metrics_at_the_same_port_again(tmp_path: Path) -> None:
    home, port = tmp_path / "home", free_port()
    start_broker(home, persistent=True)
    with connect(home) as client:
        client.add_node("local", cpus=0.1, memory_bytes=100 * MIB, metrics_port=port)
        fence = client.status().fence

        os.kill(int((home / "broker.lock").read_text()), signal.SIGKILL)
        end_s = time.monotonic() + 20
        while client.status().fence == fence:
            assert time.monotonic() < end_s
            time.sleep(0.05)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert f"tenure_broker_fence {fence + 1}" in answer.read().decode()
        client.shutdown()


# --- the dashboard ---


def expressions() -> list[str]:
    """Return every query of the dashboard, its variable replaced by any tenant."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [text.replace("$tenant", ".*").replace("$__rate_interval", "1m") for text in found]


def test_the_dashboard_asks_only_for_metrics_that_there_are() -> None:
    asked = {name for text in expressions() for name in re.findall(r"tenure_[a-z_]+", text)}
    assert len(asked) >= 15
    assert asked <= {metric.name for metric in METRICS}
