"""Roles in a home that all users share: every operation has a rule, and others' leases do not exist for a tenant."""

import asyncio
import os
from dataclasses import replace

import pytest

from tenure import wire
from tenure.broker import roles, tenancy
from tenure.broker.daemon import Broker
from tenure.errors import Conflict, NotFound, Refused, SpecError
from tenure.jobs import Command
from tenure.leases import EndReason, LeaseState
from tenure.ledger.store import Ledger
from tenure.resources import Envelope
from tenure.runs import Run, Stage
from tenure.tenants import Member, Policy, RemoveTenant, Role, SetPolicy, SetRole
from tenure.trials import Recommendation

from .conftest import World, node

USERS = {"ann": 70001, "bob": 70002, "eve": 70003}
ENVELOPE = Envelope(cpus=0.5, memory_bytes=64 << 20, slot_s=100.0, total_s=1000.0)


class User:
    """A connection as the broker sees it."""

    def __init__(self, name):
        self.uid, self.pid, self.who = USERS.get(name, os.geteuid()), 1, "test"


class Shared(World):
    """A world whose home serves the users of USERS; folders of their own are beside the point here."""

    def _open(self):
        self.ledger = Ledger.open(self.address, now_s=self.clock.utc_s)
        self.broker = Broker(
            self.ledger, self.fleet, home=self.home, clock=self.clock, term_s=60.0, new_lease_id=self._new_id, shared=True
        )

    async def by(self, who, op, **args):
        answer = await self.broker.handlers.table()[op](wire.BROKER_OPS[op].args(**args), User(who))
        await self.settle()
        return answer

    async def run_of(self, who, run_id="r-1"):
        run = Run(id=run_id, name="x", tenant="default", job_file="", source="", stages=(Stage(name="s", kind="task"),))
        return await self.by(who, "submit_run", run=run)

    async def lease_of(self, who, run_id="r-1", gang_id="", **command):
        await self.run_of(who, run_id)
        member = wire.GangMember(worker=0, envelope=ENVELOPE, command=Command(argv=("work",), **command))
        (lease,) = await self.by(
            who, "request_gang", gang_id=gang_id or f"g-{run_id}", run_id=run_id, stage="s", members=(member,)
        )
        return self.lease(lease.id)


@pytest.fixture
def share(tmp_path, monkeypatch):
    """Run a scene in a shared home; users are those of USERS, whatever users the machine has."""
    names = {uid: name for name, uid in USERS.items()}
    monkeypatch.setattr(tenancy, "tenant_name", lambda uid: names.get(uid, f"uid-{uid}"))
    monkeypatch.setattr(tenancy.Tenancy, "user_of", lambda self, tenant: "")
    monkeypatch.setattr(tenancy.Tenancy, "check_not_user", lambda self, tenant: None)

    def run(scene, *nodes):
        async def all_of_it():
            world = Shared(tmp_path, *(nodes or (node("a"),)))
            try:
                await world.up()
                await scene(world)
            finally:
                await world.close()

        asyncio.run(all_of_it())

    return run


def test_every_operation_has_a_rule_and_no_rule_is_of_none():
    assert set(roles.RULES) == set(wire.BROKER_OPS) - {"hello"}


def test_an_operation_without_a_rule_is_refused_to_all(share, monkeypatch):
    monkeypatch.setattr(roles, "RULES", {name: rule for name, rule in roles.RULES.items() if name != "live"})

    async def scene(world):
        for who in ("ann", "root"):
            with pytest.raises(Refused, match="no rule"):
                await world.by(who, "live")

    share(scene)


def _calls_on(lease, run_id):
    """Return every operation that names a lease or run, aimed at somebody's."""
    stage = Stage(name="s", kind="task")
    made = Recommendation(id="c-1", run_id=run_id, stage="s", goal="p99 < 1s", chosen=None)
    return {
        "record_recommendation": {"recommendation": made},
        "lease": {"lease_id": lease.id},
        "wait_leases": {"lease_ids": (lease.id,), "timeout_s": 0.0},
        "renew": {"lease_id": lease.id, "for_s": 50.0},
        "resize": {"lease_id": lease.id, "envelope": ENVELOPE},
        "release": {"lease_ids": (lease.id,)},
        "exec": {"lease_id": lease.id, "argv": ("id",)},
        "open_session": {"lease_id": lease.id, "argv": ("id",)},
        "usage": {"lease_id": lease.id},
        "set_stage": {"run_id": run_id, "stage": stage},
        "set_run": {"run_id": run_id, "state": "failed"},
        "nudge": {"run_id": run_id, "stage": "s"},
    }


def test_others_leases_and_runs_do_not_exist_for_a_tenant(share):
    async def scene(world):
        lease = await world.lease_of("ann")
        before = world.lease(lease.id)
        for op, args in _calls_on(lease, "r-1").items():
            with pytest.raises(NotFound) as refused:
                await world.by("bob", op, **args)
            with pytest.raises(NotFound) as never:  # the same words as for what never was
                await world.by("bob", op, **{k: _renamed(v, lease.id) for k, v in args.items()})
            assert str(refused.value).replace(lease.id, "X").replace("r-1", "X") == str(never.value).replace(
                "l-no", "X"
            ).replace("r-no", "X")
        for op in ("leases", "live", "runs", "events", "trials", "recommendations"):
            assert not await world.by("bob", op)
        assert not await world.by("bob", "leases", tenant="ann")
        assert not await world.by("bob", "leases", run_id="r-1")
        assert not await world.by("bob", "events", run_id="r-1")
        assert not await world.by("bob", "runs", run_id="r-1")
        assert world.lease(lease.id) == before
        assert [found.id for found in await world.by("ann", "leases")] == [lease.id]
        assert {event.run_id for event in await world.by("ann", "events")} == {"r-1"}

    share(scene)


def _renamed(value, lease_id):
    if isinstance(value, tuple):
        return tuple(_renamed(each, lease_id) for each in value)
    if isinstance(value, Recommendation):
        return replace(value, run_id="r-no")
    return {lease_id: "l-no", "r-1": "r-no"}.get(value, value) if isinstance(value, str) else value


def test_a_tenant_holds_in_its_own_name_whatever_it_says(share):
    async def scene(world):
        lease = await world.lease_of("ann")
        assert lease.tenant == "ann"
        assert (await world.by("ann", "runs"))[0].tenant == "ann"
        await world.run_of("bob", "r-2")
        member = wire.GangMember(worker=0, envelope=ENVELOPE, command=Command(argv=("work",)))
        with pytest.raises(Refused, match="you are tenant bob"):
            await world.by("bob", "request_gang", gang_id="g2", run_id="r-2", stage="s", tenant="ann", members=(member,))
        with pytest.raises(NotFound):
            await world.by("bob", "request_gang", gang_id="g2", run_id="r-1", stage="s", members=(member,))
        with pytest.raises(NotFound):
            await world.by("bob", "request_gang", gang_id="g2", run_id="r-none", stage="s", members=(member,))
        with pytest.raises(Conflict, match="taken"):
            await world.by("bob", "request_gang", gang_id="g-r-1", run_id="r-2", stage="s", members=(member,))

    share(scene)


def test_a_run_id_that_another_has_or_had_cannot_be_claimed(share):
    async def scene(world):
        await world.run_of("ann")
        with pytest.raises(Conflict, match="taken"):
            await world.run_of("bob")
        assert (await world.run_of("ann")).tenant == "ann"  # asking again changes nothing
        from tenure.ledger import retention

        with world.broker.book.transaction() as tx:
            retention.forget_run(tx.connection, "r-1")
        await world.settle()
        with pytest.raises(Conflict, match="taken"):  # its events and trials are ann's still
            await world.run_of("bob")
        for name in ("..", "a/b", ".hidden", ""):
            with pytest.raises(SpecError):
                await world.run_of("bob", name)

    share(scene)


@pytest.mark.parametrize(
    "command",
    [
        {"network": "netns:other"},
        {"ports": {"http": 80}},
        {"runtime": "microvm"},
        {"image": "mine"},
        {"secrets": ("AWS_SECRET_ACCESS_KEY",)},
    ],
)
def test_a_tenants_command_gets_nothing_that_is_roots_to_give(share, command):
    async def scene(world):
        with pytest.raises(Refused):
            await world.lease_of("ann", **command)
        assert not world.broker.book.live

    share(scene)


def test_what_a_broker_alone_may_say_of_an_end_a_tenant_may_not(share):
    async def scene(world):
        lease = await world.lease_of("ann")
        with pytest.raises(Refused, match="released or cancelled"):
            await world.by("ann", "release", lease_ids=(lease.id,), reason=EndReason.PREEMPTED)
        await world.by("ann", "release", lease_ids=(lease.id,))
        assert world.lease(lease.id).end_reason is EndReason.RELEASED

    share(scene)


ADMINS = {
    "add_node": {"name": "b"},
    "remove_node": {"name": "a"},
    "set_policy": {"tenant": "ann"},
    "set_role": {"tenant": "bob", "role": Role.ADMIN},
    "remove_tenant": {"tenant": "ann"},
    "collect_garbage": {},
    "shutdown": {},
    "backup": {"path": "/tmp/backup"},
}


def test_only_admins_do_what_concerns_all_and_only_root_writes_a_backup(share):
    async def scene(world):
        await world.lease_of("ann")
        for op, args in ADMINS.items():
            with pytest.raises(Refused, match="you are bob, tenant"):
                await world.by("bob", op, **args)
        await world.by("root", "set_role", tenant="ann", role=Role.ADMIN)
        await world.by("ann", "set_policy", tenant="bob", policy=Policy(max_leases=1))
        with pytest.raises(Refused, match="root"):
            await world.by("ann", "backup", path="/tmp/backup")
        await world.by("ann", "set_role", tenant="ann", role=Role.TENANT)
        with pytest.raises(Refused):
            await world.by("ann", "set_policy", tenant="bob", policy=None)

    share(scene)


def test_an_admin_sees_and_ends_others_leases_but_runs_nothing_in_them(share):
    async def scene(world):
        lease = await world.lease_of("ann")
        await world.run_of("eve", "r-eve")
        await world.by("root", "set_role", tenant="eve", role=Role.ADMIN)
        assert [found.id for found in await world.by("eve", "leases")] == [lease.id]
        assert (await world.by("eve", "lease", lease_id=lease.id)).lease.id == lease.id
        with pytest.raises(Refused, match="only that one, or root"):
            await world.by("eve", "exec", lease_id=lease.id, argv=("id",))
        with pytest.raises(Refused, match="only that one, or root"):
            await world.by("eve", "open_session", lease_id=lease.id, argv=("id",))
        with pytest.raises(Refused):
            await world.by("eve", "submit_run", run=Run(id="r-3", name="x", tenant="ann", job_file="", source=""))
        await world.by("eve", "release", lease_ids=(lease.id,))
        assert world.lease(lease.id).state is LeaseState.ENDED
        (event,) = [e for e in await world.by("root", "events") if e.kind == "lease.draining"]
        assert event.who == "admin:eve"

    share(scene)


def test_a_role_outlives_the_broker_and_another_user_of_the_name_is_not_let_in(share, monkeypatch):
    async def scene(world):
        await world.run_of("ann")
        await world.by("root", "set_role", tenant="ann", role=Role.ADMIN)
        await world.restart()
        assert (await world.by("ann", "status")).role is Role.ADMIN
        assert world.broker.tenancy.known()["ann"] == Member(tenant="ann", uid=USERS["ann"], role=Role.ADMIN)
        monkeypatch.setattr(tenancy, "tenant_name", lambda uid: "ann")
        with pytest.raises(Refused, match="another user of that name"):
            await world.by("bob", "leases")
        with pytest.raises(Conflict, match="still has"):
            await world.by("root", "remove_tenant", tenant="ann")

    share(scene)


def test_of_others_a_tenant_learns_that_a_node_is_busy_and_no_more(share):
    async def scene(world):
        long = await world.lease_of("ann", "r-aaaaaaaaaa", "w-aaaaaaaaaa")
        status = await world.by("bob", "status")
        assert (status.tenant, status.role, status.leases, status.clients) == ("bob", Role.TENANT, 0, 0)
        assert status.nodes[0].held_cpus == 0.5
        roles_ = world.broker.handlers._roles
        caller = world.broker.tenancy.caller(User("bob"))
        text = "waits for w-aaaaaaaaaa, whose lease l-0123456789 has node a-1 until 2026-01-01"
        assert roles_.covered(text, caller) == (
            "waits for another's, whose lease another's has node a-1 until 2026-01-01"
        )  # fmt: skip
        assert roles_.covered(text, world.broker.tenancy.caller(User("ann"))).startswith("waits for w-aaaaaaaaaa, whose")
        assert long.gang_id == "w-aaaaaaaaaa"
        await world.by("root", "set_policy", tenant="ann", policy=Policy(max_leases=9))
        await world.by("root", "set_policy", tenant="*", policy=Policy(max_leases=3))
        assert set(await world.by("bob", "policies")) == {"*"}
        assert set(await world.by("ann", "policies")) == {"*", "ann"}
        assert [view.member.tenant for view in await world.by("bob", "tenants")] == []

    share(scene)


def test_what_one_tenant_asks_for_at_once_is_bounded(share, monkeypatch):
    monkeypatch.setattr(roles, "MAX_ROWS", 3)
    monkeypatch.setattr(tenancy.Tenancy, "user_of", lambda self, tenant: "")

    async def scene(world):
        await world.lease_of("ann")
        assert len(await world.by("ann", "events", max_events=100)) == 3
        assert len(await world.by("root", "events", max_events=100)) > 3
        assert {"exec", "open_session", "wait_leases"} <= {name for name, rule in roles.RULES.items() if rule.at_once}
        table = world.broker.handlers.table()
        args = wire.WaitLeases(lease_ids=("l1",), timeout_s=30.0)
        waits = [asyncio.ensure_future(table["wait_leases"](args, User("ann"))) for _ in range(roles.MAX_WAITS)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="under way"):
            await table["wait_leases"](args, User("ann"))
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        await world.by("ann", "wait_leases", lease_ids=("l1",), timeout_s=0.0)

    share(scene)


def test_quotas_count_per_user(share):
    async def scene(world):
        await world.by("root", "set_policy", tenant="*", policy=Policy(max_leases=1))
        await world.lease_of("ann")
        with pytest.raises(Refused, match="quota"):
            await world.lease_of("ann", "r-2")
        assert (await world.lease_of("bob", "r-3")).state is LeaseState.ACTIVE

    share(scene)


def test_secrets_of_a_tenant_come_with_the_request_and_stay_in_memory(share, monkeypatch):
    monkeypatch.setattr(tenancy.Tenancy, "user_of", lambda self, tenant: "ann" if tenant == "ann" else "")
    monkeypatch.setattr(tenancy.Tenancy, "actor_of", lambda self, tenant: None)
    monkeypatch.setenv("TOKEN", "of the broker")

    async def scene(world):
        await world.run_of("ann")
        command = Command(argv=("work",), secrets=("TOKEN",))
        member = wire.GangMember(worker=0, envelope=ENVELOPE, command=command)
        await world.by(
            "ann",
            "request_gang",
            gang_id="g",
            run_id="r-1",
            stage="s",
            members=(member,),
            secrets={"TOKEN": "of ann", "X": "y"},
        )
        (spec,) = world.fleet.started
        assert spec.env["TOKEN"] == "of ann"
        assert spec.user == "ann"
        assert not {"HOME", "USER", "TMPDIR"} & set(spec.env)
        kept = (world.home / "ledger.sqlite").read_bytes() + (world.home / "ledger.sqlite-wal").read_bytes()
        assert b"of ann" not in kept

    share(scene)


def test_a_home_of_ones_own_has_one_caller(play):
    async def scene(world):
        table = world.broker.handlers.table()
        with pytest.raises(Refused, match="serves its owner alone"):
            await table["leases"](wire.ListLeases(), User("ann"))
        with pytest.raises(Conflict, match="--shared"):
            await table["set_role"](SetRole(tenant="ann", role=Role.ADMIN), None)
        with pytest.raises(Conflict, match="--shared"):
            await table["remove_tenant"](RemoveTenant(tenant="ann"), None)
        await table["set_policy"](SetPolicy(tenant="ann", policy=Policy(max_leases=1)), User("me"))
        assert (await table["tenants"](wire.Nothing(), None)) == ()

    play(scene)


def test_names_that_could_be_taken_for_something_else_get_a_number(monkeypatch):
    class Entry:
        pw_name = ""

    monkeypatch.setattr(tenancy.pwd, "getpwuid", lambda uid: Entry)
    for name, tenant in (("ann", "ann"), ("Ann", "uid-7"), ("root", "uid-7"), ("default", "uid-7"), ("uid-9", "uid-7")):
        Entry.pw_name = name
        assert tenancy.tenant_name(7) == tenant
