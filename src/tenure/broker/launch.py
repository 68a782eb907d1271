"""One command under one lease: `protocols.Launch` by way of the broker. What probes, tasks and servers are started with."""

from __future__ import annotations

import itertools
import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tenure.broker.client import BrokerClient
from tenure.errors import JobFailed, Refused, Unavailable
from tenure.leases import EndReason, Lease, LeaseState
from tenure.protocols import Exit, ExitKind, LaunchRequest
from tenure.runs import RunFiles
from tenure.usage import Usage
from tenure.wire import GangMember, LeaseView, RequestGang

ENDPOINTS_MAX_S = 60.0
START_MAX_S = 60.0
_ANSWER_S = 1.0


class BrokerLaunch:
    """Launches commands of one stage, each under a lease of its own; `lease_ids` are those launched so far."""

    def __init__(
        self, client: BrokerClient, *, home: Path, run_id: str, stage: str, tenant: str = "default", queue_s: float = 60.0
    ) -> None:
        self._client, self._files, self._stage = client, RunFiles(home.resolve(), run_id), stage
        self._tenant, self._queue_s = tenant, queue_s
        self._workers = itertools.count()
        self.lease_ids: list[str] = []

    def __call__(self, request: LaunchRequest) -> BrokerLaunched:
        """Return once the command runs, and listens where it names ports.

        Raises NoPlacement or Refused when there is no room (at all, or within `queue_s`), JobFailed with the end of its
        log when it ended before it ran or listened.
        """
        gang_id = f"{request.name}-{secrets.token_hex(6)}"
        member = GangMember(worker=next(self._workers), envelope=request.envelope, command=request.command)
        (lease,) = self._client.request_gang(
            RequestGang(
                gang_id=gang_id,
                run_id=self._files.run_id,
                stage=self._stage,
                tenant=self._tenant,
                members=(member,),
                queue_s=self._queue_s,
                resumes=request.resumes,
            )
        )
        self.lease_ids.append(lease.id)
        end_s = time.monotonic() + self._queue_s + START_MAX_S
        while True:
            left_s = max(0.1, min(30.0, end_s - time.monotonic()))
            (view,) = self._client.wait_leases([lease.id], until="active", timeout_s=left_s)
            if view.lease.state is LeaseState.ENDED and not view.exits:
                text = f"{request.name} was not started: {view.lease.end_detail or view.lease.end_reason}"
                if view.lease.end_reason is EndReason.CANCELLED:
                    raise Refused(f"{text}. Ask for less, or release something and try again.")
                raise JobFailed(text, reason=str(view.lease.end_reason))
            if view.lease.state not in (LeaseState.REQUESTED, LeaseState.QUEUED, LeaseState.GRANTING):
                break
            if time.monotonic() > end_s:
                self.release_all(why="it did not start in time")
                raise Unavailable(f"{request.name} (lease {lease.id}) was granted but did not start in {START_MAX_S:g} s")
        launched = BrokerLaunched(self._client, self._files, view, request, went_on=self.lease_ids.append)
        emulated = request.command.runtime == "microvm"  # it may be, and is then several times slower
        launched.wait_listening(ENDPOINTS_MAX_S * (5 if emulated else 1))
        return launched

    def release_all(self, why: str = "the launching command is over") -> None:
        """Ask everything launched so far to end; returns at once. What has ended stays as it is."""
        if self.lease_ids:
            self._client.release(self.lease_ids, why=why)


def next_of(client: BrokerClient, ended: Sequence[Lease]) -> tuple[str, ...]:
    """Return the leases under which others that were preempted go on, in the same order; none where they do not."""
    if not ended or any(lease.end_reason is not EndReason.PREEMPTED or not lease.resumes for lease in ended):
        return ()
    known = client.leases(run_id=ended[0].run_id, stage=ended[0].stage)
    after = {lease.goes_on: lease.id for lease in known}
    return tuple(after[lease.id] for lease in ended if lease.id in after)


class BrokerLaunched:
    """Something that runs under a lease. Implements `protocols.Launched`."""

    def __init__(
        self,
        client: BrokerClient,
        files: RunFiles,
        view: LeaseView,
        request: LaunchRequest,
        *,
        went_on: Callable[[str], None] = lambda lease_id: None,
    ) -> None:
        """went_on: told the lease under which it goes on after it was preempted."""
        self._client, self._files, self._request, self._went_on = client, files, request, went_on
        self._see(view)

    def _see(self, view: LeaseView) -> None:
        lease, files = view.lease, self._files
        self._view = view
        self.lease_id = lease.id
        self._heard: dict[str, str] = {}
        self.worker_dir = files.worker(lease.stage, lease.worker, lease.attempt)
        self.log_path = files.logs(lease.stage) / f"{lease.worker}.{lease.attempt}.log"

    @property
    def endpoints(self) -> Mapping[str, str]:
        """See Launched; empty until the command has written ``endpoints.json``, or its ports answer."""
        if not self._request.command.announces:
            return self._answering()
        try:
            found = json.loads((self.worker_dir / "endpoints.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        addresses = {str(name): str(address) for name, address in found.items()}
        if self._request.command.runtime == "container":  # inside it listens on everything; outside that is our loopback
            addresses = {name: address.replace("0.0.0.0:", "127.0.0.1:") for name, address in addresses.items()}
        return addresses

    def _answering(self) -> Mapping[str, str]:
        """Return the ports at which somebody has answered; once they did they stay."""
        for name, port in self._request.command.ports.items():
            # Who forwards to a virtual machine accepts, and says nothing, before anything listens in there.
            if name not in self._heard and port_answers(port, silent=self._request.command.runtime != "microvm"):
                self._heard[name] = f"127.0.0.1:{port}"
        return dict(self._heard)

    def wait_listening(self, timeout_s: float) -> None:
        """Return once every port the command names has an endpoint. Raises JobFailed when it ends or takes longer."""
        names = set(self._request.command.ports)
        end_s = time.monotonic() + timeout_s
        while missing := names - set(self.endpoints):
            ended = self.wait(0.05)
            late = time.monotonic() > end_s
            if ended is None and not late:
                continue
            if ended is None:
                ended = self.stop()
            what = f"did not listen on {', '.join(sorted(missing))} within {timeout_s:g} s" if late else f"ended {ended.kind}"
            lease = self._view.lease
            raise JobFailed(
                f"{self._request.name} {what} ({lease.end_detail or 'lease ' + self.lease_id})\n{ended.log_tail}".rstrip(),
                reason=str(lease.end_reason or ended.kind),
            )

    def usage(self) -> Usage:
        """See Launched. All zero before the first sample (about a second after the start)."""
        self._view = self._client.lease(self.lease_id)
        return self._view.usage or Usage(at_s=time.time())

    def wait(self, timeout_s: float) -> Exit | None:
        """See Launched."""
        (view,) = self._client.wait_leases([self.lease_id], timeout_s=timeout_s)
        self._see(view)
        if next_id := next_of(self._client, [view.lease]):
            self._went_on(next_id[0])
            self._see(self._client.lease(next_id[0]))
        return self._exit()

    def stop(self, grace_s: float = 5.0) -> Exit:
        """See Launched. The grace is the command's own (`Command.grace_s`); grace_s bounds nothing shorter than that."""
        if self._view.lease.state is not LeaseState.ENDED:
            self._client.release([self.lease_id], why="stopped by who launched it")
        end_s = time.monotonic() + max(grace_s, self._request.command.grace_s) + 30.0
        while time.monotonic() < end_s:
            if (ended := self.wait(5.0)) is not None:
                return ended
        raise Unavailable(f"lease {self.lease_id} has not ended after SIGTERM, its grace, SIGKILL and 30 s")

    def _exit(self) -> Exit | None:
        lease = self._view.lease
        if lease.state is not LeaseState.ENDED:
            return None
        if self._view.exits:
            return self._view.exits[-1]
        # It ended without an attempt's record: its node was lost, or it was released before it ran.
        return Exit(
            kind=ExitKind.FAILED, witness=f"lease ended {lease.end_reason}: {lease.end_detail}", ended_at_s=lease.ended_at_s
        )


def port_answers(port: int, *, silent: bool) -> bool:
    """Return whether a program is behind a port of 127.0.0.1.

    A connection alone says nothing: who forwards to a virtual machine or a container accepts for it. So it is spoken to; what
    answers is there. silent: so is what holds on to the connection without a word.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S) as line:
            line.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return bool(line.recv(1))
    except TimeoutError:
        return silent
    except OSError:
        return False
