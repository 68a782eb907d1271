"""The broker's operations (`wire.BROKER_OPS`), one method each: look up, hand on, answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from tenure import orders, wire
from tenure.broker.attempts import Attempts
from tenure.broker.book import Book
from tenure.broker.giving_way import GivingWay
from tenure.broker.invocations import Invocations
from tenure.broker.metrics_door import MetricsDoor
from tenure.broker.nodes import Nodes
from tenure.broker.outbox import answering
from tenure.broker.policies import Policies
from tenure.broker.queue import Queue
from tenure.broker.quota import Quotas
from tenure.broker.retention import Retention
from tenure.broker.roles import Roles
from tenure.broker.tenancy import Tenancy
from tenure.errors import Conflict, IllegalChange, Refused, TenureError, Unavailable
from tenure.events import Event
from tenure.fleet.contract import Fleet, Part
from tenure.frames import OpenSession, SessionAt
from tenure.leases import EndReason, Lease, LeaseState, changed, renewed
from tenure.ledger import portable, queries
from tenure.nodes import Node
from tenure.resources import Envelope
from tenure.retention import CollectGarbage, Freed
from tenure.runs import Run
from tenure.sockets import Connection, Handler
from tenure.tenants import Policy, RemoveTenant, SetPolicy, SetRole, TenantView
from tenure.trials import Recommendation, Trial

UNWRITABLE_MAX_S = 5.0
"""How long the ledger may refuse to be written before those who wait for leases are told so."""
MAX_WAIT_S = 600.0
DRAIN_MAX_S = 60.0
"""How long the leases of a node that is taken out may take to end."""
MAX_ROWS = 100_000
_READY = (LeaseState.ACTIVE, LeaseState.RESIZING, LeaseState.DRAINING, LeaseState.ENDED)


class Handlers:
    """What clients may ask. `on_shutdown` is called after `shutdown` has been answered for."""

    def __init__(
        self,
        book: Book,
        *,
        fleet: Fleet,
        nodes: Nodes,
        queue: Queue,
        attempts: Attempts,
        invocations: Invocations,
        retention: Retention,
        quotas: Quotas,
        policies: Policies,
        giving_way: GivingWay,
        tenancy: Tenancy,
        metrics_door: MetricsDoor,
        fence: int,
        persistent: Callable[[], bool],
        clients: Callable[[], int],
        on_stay: Callable[[], Awaitable[None]],
        on_nodes: Callable[[], None],
        on_shutdown: Callable[[], None],
    ) -> None:
        self._book, self._fleet, self._nodes, self._queue = book, fleet, nodes, queue
        self._attempts, self._invocations, self._retention, self._quotas = attempts, invocations, retention, quotas
        self._policies, self._giving_way, self._metrics_door = policies, giving_way, metrics_door
        self._tenancy, self._roles = tenancy, Roles(book, tenancy)
        self._backing_up = False
        self._fence, self._persistent, self._clients, self._on_shutdown = fence, persistent, clients, on_shutdown
        self._on_stay, self._on_nodes = on_stay, on_nodes
        self._one_change = asyncio.Lock()

    def table(self) -> dict[str, Handler]:
        """Return operation -> handler, each for those who may ask for it."""
        return {
            name: self._roles.guarded(name, answering(self._book, getattr(self, f"op_{name}")))
            for name in wire.BROKER_OPS
            if name != "hello"
        }

    async def op_status(self, args: wire.Nothing, client: Connection) -> wire.Status:
        """See wire.Status."""
        return wire.Status(
            fence=self._fence,
            leases=len(self._book.live),
            clients=self._clients(),
            nodes=self._nodes.listed(),
            persistent=self._persistent(),
            unreached=self._nodes.why_unreached(),
            order=self._book.order,
        )

    # --- nodes ---

    async def op_add_node(self, args: wire.AddNode, client: Connection) -> Node:
        """See wire.AddNode."""
        part = Part(
            name=args.name,
            cpus=args.cpus,
            memory_bytes=args.memory_bytes,
            gpus=args.gpus,
            gpu_memory_bytes=args.gpu_memory_bytes,
            gpu_model=args.gpu_model,
        )
        if args.metrics_port:
            await self._metrics_door.open(args.metrics_port)
            self._on_nodes()
        if args.order and args.order != self._book.order:
            self._book.queue_by(args.order)
            self._on_nodes()
        async with self._one_change:
            node = await self._nodes.add(part, on_nodes=self._on_nodes)
            await self._on_stay()
        return node

    async def op_remove_node(self, args: wire.RemoveNode, client: Connection) -> None:
        """See wire.RemoveNode."""
        async with self._one_change:
            self._nodes.drain(args.name)
            why = f"node {args.name} is taken out"
            gangs = {lease.gang_id or lease.id for lease in self._book.live.values() if lease.node == args.name}
            for lease in list(self._book.live.values()):
                if (lease.gang_id or lease.id) in gangs:
                    self._attempts.drain(lease, EndReason.RELEASED, why)
            end_s = self._book.clock.boot_s() + DRAIN_MAX_S
            while held := sorted(lease.id for lease in self._book.live.values() if lease.holds and lease.node == args.name):
                if self._book.clock.boot_s() >= end_s:
                    raise Unavailable(
                        f"node {args.name} gets no new lease, but {', '.join(held)} did not end within {DRAIN_MAX_S:g} s. "
                        "Try again; a node that cannot be reached gives its leases up once its term is over."
                    )
                await self._book.changed(1.0)
            await self._nodes.remove(args.name)
            self._on_nodes()

    # --- runs ---

    async def op_submit_run(self, args: wire.SubmitRun, client: Connection) -> Run:
        """See wire.SubmitRun."""
        with self._book.transaction() as tx:
            known = queries.list_runs(tx.connection, run_id=args.run.id)
            if known:
                return known[0]
            tx.put_run(args.run, who=f"tenant:{args.run.tenant}", why=args.run.name)
        return args.run

    async def op_set_stage(self, args: wire.SetStage, client: Connection) -> None:
        """See wire.SetStage."""
        with self._book.transaction() as tx:
            run = queries.get_run(tx.connection, args.run_id)
            tx.put_stage(args.run_id, args.stage, who=f"tenant:{run.tenant}")

    async def op_set_run(self, args: wire.SetRun, client: Connection) -> None:
        """See wire.SetRun."""
        with self._book.transaction() as tx:
            run = queries.get_run(tx.connection, args.run_id)
            tx.put_run_state(args.run_id, args.state, who=f"tenant:{run.tenant}", why=args.why)

    async def op_runs(self, args: wire.ListRuns, client: Connection) -> tuple[Run, ...]:
        """See wire.ListRuns."""
        with self._book.ledger.reading() as connection:
            return queries.list_runs(connection, run_id=args.run_id, tenant=args.tenant, max_runs=min(args.max_runs, MAX_ROWS))

    # --- leases ---

    async def op_request_gang(self, args: wire.RequestGang, client: Connection) -> tuple[Lease, ...]:
        """See wire.RequestGang."""
        await self._quotas.admit(args.run_id)
        self._attempts.secrets.put(args.gang_id, args.secrets)
        return await self._queue.request(replace(args, secrets={}))

    async def op_wait_leases(self, args: wire.WaitLeases, client: Connection) -> tuple[wire.LeaseView, ...]:
        """See wire.WaitLeases."""
        ready = _READY if args.until == "active" else (LeaseState.ENDED,)
        end_s = self._book.clock.boot_s() + min(max(args.timeout_s, 0.0), MAX_WAIT_S)
        for lease_id in args.lease_ids:
            self._book.lease(lease_id)
        while any((lease := self._book.live.get(lease_id)) and lease.state not in ready for lease_id in args.lease_ids):
            left_s = end_s - self._book.clock.boot_s()
            if left_s <= 0:
                break
            if self._book.clock.boot_s() - self._book.unwritable_since_s > UNWRITABLE_MAX_S:
                raise Refused(f"the leases cannot be waited for: {self._book.ledger.refusal}")
            await self._book.changed(min(left_s, UNWRITABLE_MAX_S))
        return tuple(self._book.view(lease_id) for lease_id in args.lease_ids)

    async def op_lease(self, args: wire.LeaseRef, client: Connection) -> wire.LeaseView:
        """Return one lease."""
        return self._book.view(args.lease_id)

    async def op_leases(self, args: wire.ListLeases, client: Connection) -> tuple[Lease, ...]:
        """See wire.ListLeases."""
        with self._book.ledger.reading() as connection:
            return queries.select_leases(connection, replace(args, max_leases=min(args.max_leases, MAX_ROWS)))

    async def op_renew(self, args: wire.Renew, client: Connection) -> Lease:
        """See wire.Renew."""
        before, now_s = self._book.lease(args.lease_id), self._book.clock.utc_s()
        lease = renewed(before, for_s=args.for_s, now_s=now_s)
        self._policies.admit_renewal(before, args.for_s)
        if given := self._giving_way.refuses(before):
            raise Refused(
                f"lease {lease.id} is not renewed: it {given}. It goes on to the end of its slot; save what is needed."
            )
        lease = replace(lease, end_reason=None, end_detail="")  # an earlier renewal may have been refused
        until_s, reserved = self._book.placement.ahead(now_s).limit(before)
        why = ""
        if reserved is not None and until_s < lease.ends_at_s:
            why = f"its room is reserved from then on (lease {reserved.id})"
            lease = replace(lease, ends_at_s=max(before.ends_at_s, until_s))
            if lease.ends_at_s <= before.ends_at_s:
                raise Refused(f"lease {lease.id} cannot be renewed: {why}. Release it and request a new one, or wait.")
        with self._book.transaction() as tx:
            tx.put_lease(lease, kind="lease.renewed", who=self._tenancy.who(client, lease.tenant), why=why)
        if lease.id in self._book.busy:
            await self._attempts.renew(lease)
        return lease

    async def op_resize(self, args: wire.Resize, client: Connection) -> Lease:
        """See wire.Resize. Raises Refused when the node lacks room or the runtime refuses; the lease is then as before.

        Raises Unavailable when the node did not answer: it then holds the larger of both until the node is heard of again, or
        until it is resized once more.
        """
        return await self.resize(args, self._tenancy.who(client, self._book.lease(args.lease_id).tenant))

    async def resize(self, args: wire.Resize, who: str) -> Lease:
        """Do as `op_resize` says. who: who wants it."""
        lease = self._book.lease(args.lease_id)
        old = lease.envelope
        new = replace(args.envelope, slot_s=old.slot_s, total_s=old.total_s)
        half_done = lease.state is LeaseState.RESIZING and lease.id not in self._attempts.resizing
        if lease.state is not LeaseState.ACTIVE and not half_done:
            raise IllegalChange(f"lease {lease.id} is {lease.state}; only an active lease can be resized")
        short = self._book.placement.resize_shortage(lease.id, new)
        self._policies.admit_resize(lease, new)
        until_s, reserved = self._book.placement.ahead(self._book.clock.utc_s()).limit(replace(lease, envelope=new))
        if not short and reserved is not None and until_s < lease.ends_at_s:
            short = f"lease {reserved.id} has reserved that room within its time"
        if short:
            raise Refused(f"lease {lease.id} cannot be resized on node {lease.node}: {short}")
        # While under way it holds the larger of both in each respect, so that nobody else is granted what it may still use.
        held = replace(
            new,
            cpus=max(old.cpus, new.cpus),
            memory_bytes=max(old.memory_bytes, new.memory_bytes),
            disk_bytes=max(old.disk_bytes, new.disk_bytes),
        )
        with self._book.transaction() as tx:
            begun = replace(lease, envelope=held) if half_done else changed(lease, LeaseState.RESIZING, envelope=held)
            begun = replace(begun, full_cpus=0.0)  # whoever cuts it for idleness says so afterwards
            tx.put_lease(begun, who=who, why=new.describe())
        self._attempts.resizing.add(lease.id)
        try:
            if lease.id in self._book.busy:
                order = orders.AgentResize(lease_id=lease.id, fence=lease.fence, envelope=new)
                await self._fleet.call(lease.node, "resize", order)
        except Unavailable:
            raise  # it may have been done: `attempts` settles it
        except TenureError as error:
            self._resized(lease.id, old, f"refused: {error}")
            raise
        finally:
            self._attempts.resizing.discard(lease.id)
        return self._resized(lease.id, new, "")

    def _resized(self, lease_id: str, envelope: Envelope, why: str) -> Lease:
        lease = self._book.lease(lease_id)
        if lease.state is LeaseState.RESIZING:
            lease = changed(lease, LeaseState.ACTIVE, envelope=envelope)
            with self._book.transaction() as tx:
                tx.put_lease(lease, who="broker", why=why or f"resized to {envelope.describe()}")
        return lease

    async def op_release(self, args: wire.Release, client: Connection) -> None:
        """See wire.Release. Leases that have ended are left as they are."""
        for lease in [self._book.lease(lease_id) for lease_id in args.lease_ids]:
            who = self._tenancy.who(client, lease.tenant)
            self._attempts.drain(lease, args.reason, args.why or f"{args.reason} on request", who=who)

    async def op_exec(self, args: wire.Exec, client: Connection) -> wire.ExecResult:
        """See wire.Exec."""
        node = self._node_of_running(args.lease_id)
        return await self._fleet.call(node, "exec", args, timeout_s=args.timeout_s + 10.0)  # type: ignore[no-any-return]

    async def op_open_session(self, args: OpenSession, client: Connection) -> SessionAt:
        """See OpenSession. What is said in it goes between client and agent alone."""
        node = self._node_of_running(args.lease_id)
        return await self._fleet.call(node, "open_session", replace(args, uid=client.uid), timeout_s=40.0)  # type: ignore[no-any-return]

    def _node_of_running(self, lease_id: str) -> str:
        """Return the node where a lease's command runs. Raises NotFound, Conflict."""
        lease = self._book.lease(lease_id)
        if lease.id not in self._book.busy or lease.state not in (LeaseState.ACTIVE, LeaseState.RESIZING):
            raise Conflict(f"lease {lease.id} is {lease.state} and nothing runs in it: no command can be run inside")
        return lease.node

    async def op_live(self, args: wire.Nothing, client: Connection) -> tuple[wire.LeaseView, ...]:
        """Return the live leases with their latest usage. From memory: it is asked every second."""
        live = sorted(self._book.live.values(), key=lambda lease: (lease.requested_at_s, lease.id))
        return tuple(wire.LeaseView(lease=lease, usage=self._book.usage.get(lease.id)) for lease in live)

    async def op_set_policy(self, args: SetPolicy, client: Connection) -> None:
        """See SetPolicy."""
        self._policies.set(args, who="broker" if client is None else f"uid:{client.uid}")

    async def op_policies(self, args: wire.Nothing, client: Connection) -> dict[str, Policy]:
        """Return the policies that were set, by tenant."""
        return dict(self._policies.known())

    # --- tenants ---

    async def op_tenants(self, args: wire.Nothing, client: Connection) -> tuple[TenantView, ...]:
        """Return the tenants with what they hold."""
        return self._tenancy.views()

    async def op_set_role(self, args: SetRole, client: Connection) -> None:
        """See SetRole."""
        self._tenancy.set_role(args, who=self._tenancy.who(client, ""))

    async def op_remove_tenant(self, args: RemoveTenant, client: Connection) -> None:
        """See RemoveTenant."""
        self._tenancy.remove(args, who=self._tenancy.who(client, ""))

    async def op_home_volume(self, args: wire.Nothing, client: Connection) -> str:
        """Return where the caller's home volume lies, made when missing."""
        return str(self._tenancy.make_volume(self._tenancy.caller(client).tenant or "default"))

    async def op_nudge(self, args: wire.Nudge, client: Connection) -> None:
        """See wire.Nudge."""
        self._invocations.tick(now=True)

    # --- what was observed ---

    async def op_events(self, args: wire.ListEvents, client: Connection) -> tuple[Event, ...]:
        """See wire.ListEvents."""
        with self._book.ledger.reading() as connection:
            return queries.events_after(
                connection,
                args.after_seq,
                run_id=args.run_id,
                max_events=min(args.max_events, MAX_ROWS),
                tenant=args.tenant,
            )

    async def op_usage(self, args: wire.LeaseRef, client: Connection) -> tuple[wire.UsagePoint, ...]:
        """Return a lease's rollups."""
        self._book.lease(args.lease_id)
        self._book.flush_usage()
        with self._book.ledger.reading() as connection:
            return queries.lease_usage(connection, args.lease_id)

    async def op_record_trial(self, args: wire.RecordTrial, client: Connection) -> None:
        """See wire.RecordTrial."""
        trial = args.trial
        with self._book.transaction() as tx:
            if queries.insert_trial(tx.connection, trial):
                data = {"trial": trial.id, "source": trial.source, "fingerprint": trial.fingerprint}
                tx.append("trial.recorded", who="broker", run_id=trial.run_id, stage=trial.stage, data=data)

    async def op_trials(self, args: wire.ListTrials, client: Connection) -> tuple[Trial, ...]:
        """See wire.ListTrials."""
        with self._book.ledger.reading() as connection:
            return queries.list_trials(connection, replace(args, max_trials=min(args.max_trials, MAX_ROWS)))

    async def op_record_recommendation(self, args: wire.RecordRecommendation, client: Connection) -> None:
        """See wire.RecordRecommendation."""
        made = args.recommendation
        with self._book.transaction() as tx:
            if queries.insert_recommendation(tx.connection, made):
                data = {"recommendation": made.id}
                tx.append("recommended", who="broker", why=made.why, run_id=made.run_id, stage=made.stage, data=data)

    async def op_recommendations(self, args: wire.ListRecommendations, client: Connection) -> tuple[Recommendation, ...]:
        """See wire.ListRecommendations."""
        with self._book.ledger.reading() as connection:
            return queries.list_recommendations(connection, args.run_id, args.tenant)

    async def op_collect_garbage(self, args: CollectGarbage, client: Connection) -> tuple[Freed, ...]:
        """See CollectGarbage."""
        return await self._retention.collect(args)

    async def op_backup(self, args: wire.MakeBackup, client: Connection) -> wire.Backup:
        """See wire.MakeBackup. It reads beside the broker, which goes on meanwhile; one at a time."""
        if self._backing_up:
            raise Conflict("another backup is being made; try again when it is through")
        self._backing_up = True
        try:
            await self._book.durable()
            at, now_s = self._book.ledger.address, self._book.clock.utc_s()
            return await asyncio.to_thread(portable.write_backup, at, Path(args.path), now_s=now_s, force=args.force)
        finally:
            self._backing_up = False

    async def op_shutdown(self, args: wire.Nothing, client: Connection) -> None:
        """End every lease (released), then the agents, then the broker. Answers once all leases have ended, or after 30 s."""
        for lease in list(self._book.live.values()):
            self._attempts.drain(lease, EndReason.RELEASED, "the broker was shut down")
        end_s = self._book.clock.boot_s() + 30.0
        while self._book.live and self._book.clock.boot_s() < end_s:
            await self._book.changed(1.0)
        self._on_shutdown()
