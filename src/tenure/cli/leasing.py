"""`tenure lease renew resize exec top`: what a holder does with a lease. Not here: what each means (`tenure.leasing`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tenure.cli import output
from tenure.errors import SpecError

if TYPE_CHECKING:  # the nouns cost 60 ms, which `tenure --help` need not pay
    from tenure.leases import Lease
    from tenure.leasing import Watched
    from tenure.nodes import Node
    from tenure.tenants import Policy

Home = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="DIR", help="Where Tenure keeps its state [default: $TENURE_HOME, else the user's data folder]."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")]
LeaseArgument = Annotated[str, typer.Argument(metavar="LEASE", help="Id of the lease; `tenure leases --live` lists them.")]
CLEAR = "\x1b[H\x1b[J"
"""Cursor to the top left, and nothing below it."""


def lease(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- COMMAND...]",
            help="What to run inside [default: JupyterLab when the environment has it, else nothing: `tenure exec` brings it].",
        ),
    ] = None,
    cpus: Annotated[float, typer.Option("--cpus", metavar="N", help="Cores; may be a fraction.")] = 1.0,
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="E.g. 4GiB.")] = "1GiB",
    gpu: Annotated[float, typer.Option("--gpu", metavar="N", help="Devices, or a fraction of one.")] = 0.0,
    gpu_memory: Annotated[str, typer.Option("--gpu-memory", metavar="SIZE", help="Of each device.")] = "0B",
    disk: Annotated[str, typer.Option("--disk", metavar="SIZE", help="What may be written in the workspace.")] = "10GiB",
    for_: Annotated[
        str, typer.Option("--for", metavar="TIME", help="How long, e.g. 8h; it then ends, unless it is renewed before.")
    ] = "1h",
    at: Annotated[
        str,
        typer.Option("--at", metavar="TIME", help="Reserve it from then on: 20:00, the next one here, or 2025-01-31T20:00."),
    ] = "",
    renewable: Annotated[
        str, typer.Option("--renewable", metavar="TIME", help="How long it can be renewed for, all in all [default: 7d].")
    ] = "",
    env: Annotated[
        Path | None,
        typer.Option(
            "--env",
            metavar="FILE",
            help="A requirements file: its packages are installed once, and found again by the next lease with the same lines.",
        ),
    ] = None,
    image: Annotated[
        str, typer.Option("--image", metavar="NAME", help="An image that the node's engine has, to run in a container of.")
    ] = "",
    runtime: Annotated[
        str, typer.Option("--runtime", metavar="NAME", help="process, or container [default: process, container with --image].")
    ] = "",
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What to call the workspace.")] = "workspace",
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Who holds it.")] = "default",
    grace: Annotated[
        str, typer.Option("--grace", metavar="TIME", help="To save and leave in: between SIGTERM at its end and SIGKILL.")
    ] = "10s",
    right_size: Annotated[
        str,
        typer.Option(
            "--right-size",
            metavar="WHAT",
            help="When what it uses speaks for more or less: propose it (an event), apply it, or leave it off.",
        ),
    ] = "propose",
    wait: Annotated[str, typer.Option("--wait", metavar="TIME", help="How long it may queue for room.")] = "1h",
    home: Home = None,
    json: Json = False,
) -> None:
    """Lease a workspace: so many cores, so much memory, for so long; it outlives this command, and says how to get in.

    It begins in its tenant's home volume, a folder that outlives every lease. With jupyterlab in the requirements it is
    JupyterLab, and its URL is printed with the token. It needs `tenure up`. Ctrl-C while it queues gives it up. With --at it
    is a reservation: its room is kept, and nothing that is granted or renewed until then runs into it.
    """
    from tenure import verbs
    from tenure.cli import workspaces
    from tenure.leasing import parse_moment
    from tenure.resources import parse_bytes, parse_duration

    held = verbs.lease(
        command or (),
        home=home,
        cpus=cpus,
        memory_bytes=parse_bytes(memory),
        gpus=gpu,
        gpu_memory_bytes=parse_bytes(gpu_memory),
        disk_bytes=parse_bytes(disk),
        for_s=parse_duration(for_),
        at_s=parse_moment(at, now_s=time.time()) if at else 0.0,
        renewable_s=parse_duration(renewable) if renewable else None,
        name=name,
        tenant=tenant,
        grace_s=parse_duration(grace),
        wait_s=parse_duration(wait),
        setup=workspaces.setup(env, image, runtime),
        told=workspaces.told,
        right_size=right_size,
    )
    url = verbs.workspace_url(held, home=home)
    nodes = verbs.nodes(home=home) if held.devices else ()
    output.say(workspaces.as_json(held, url) if json else workspace_text(held, url, nodes), sys.stdout)


def renew(
    lease: LeaseArgument,
    for_: Annotated[str, typer.Option("--for", metavar="TIME", help="From now on, e.g. 2h.")],
    home: Home = None,
    json: Json = False,
) -> None:
    """Have a lease end later: so long from now, never past what it is renewable for, never earlier than it would have."""
    from tenure import verbs
    from tenure.resources import parse_duration

    held = verbs.renew(lease, for_s=parse_duration(for_), home=home)
    output.say(output.as_json(held) if json else _until(held), sys.stdout)


def resize(
    lease: LeaseArgument,
    cpus: Annotated[float | None, typer.Option("--cpus", metavar="N", help="Cores; may be a fraction.")] = None,
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="E.g. 8GiB.")] = "",
    disk: Annotated[str, typer.Option("--disk", metavar="SIZE", help="What may be written in the workspace.")] = "",
    home: Home = None,
    json: Json = False,
) -> None:
    """Change what a lease may use while it runs, without a restart; what is not named stays. Nothing is killed for it.

    Less memory than is in use is refused. Devices cannot be changed.
    """
    from tenure import verbs
    from tenure.resources import parse_bytes

    held = verbs.resize(
        lease,
        cpus=cpus,
        memory_bytes=parse_bytes(memory) if memory else None,
        disk_bytes=parse_bytes(disk) if disk else None,
        home=home,
    )
    output.say(
        output.as_json(held) if json else f"lease {output.clean(held.id)} now has {held.envelope.describe()}", sys.stdout
    )


def execute(
    lease: LeaseArgument,
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run.")],
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Hand on what comes in here, and show output as it comes.")
    ] = False,
    tty: Annotated[
        bool,
        typer.Option("--tty", "-t", help="In a terminal of its own, shown in this one; Ctrl-C goes inside. With -i or alone."),
    ] = False,
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="TIME", help="It is ended when it takes longer [10min; with -i or -t none].")
    ] = "",
    home: Home = None,
    json: Json = False,
) -> None:
    """Run one command inside a lease: in its folder, under its bounds. Prints its output (the first MiB), ends with its code.

    `tenure exec -it LEASE -- bash` is a shell inside. A command that a signal ended gives 128 and the signal's number, as in
    a shell. One that is talked to ends when this end hangs up.
    """
    from tenure import verbs
    from tenure.resources import parse_duration

    if interactive or tty:
        if json:
            raise SpecError("--json and a command that is talked to (-i, -t) exclude each other")
        from tenure.cli.terminal import talk

        code = talk(lease, command, in_terminal=tty, timeout_s=parse_duration(timeout) if timeout else 0.0, home=home)
        raise typer.Exit(code if code >= 0 else 128 - code)
    done = verbs.execute(lease, command, timeout_s=parse_duration(timeout or "10min"), home=home)
    if json:
        output.say(output.as_json(done), sys.stdout)
    elif done.output:
        sys.stdout.write(done.output)
        sys.stdout.flush()
    raise typer.Exit(done.code if done.code >= 0 else 128 - done.code)


def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once; so does an output that is no terminal.")] = False,
    every: Annotated[str, typer.Option("--every", metavar="TIME", help="Between two looks.")] = "1s",
    home: Home = None,
    json: Json = False,
) -> None:
    """Watch the live leases: what each uses against what it may, and how long it has left. Ctrl-C ends it."""
    from itertools import islice

    from tenure import verbs
    from tenure.resources import parse_duration

    every_s = parse_duration(every)
    if not 0.1 <= every_s <= 3600:
        raise SpecError(f"--every must lie between 100ms and 1h; found {every}")
    looks = verbs.top(home=home, every_s=every_s)
    if once or json or not sys.stdout.isatty():
        first, second = islice(looks, 2)  # cores in use are known from the second look on
        seen = second or first
        output.say(output.as_json(seen) if json else top_table(seen), sys.stdout)
        return
    try:
        for seen in looks:
            output.say(CLEAR + top_table(seen), sys.stdout)
    except KeyboardInterrupt:
        return


def quota(
    tenant: Annotated[
        str, typer.Argument(metavar="[TENANT]", help="Whose, or '*': of all without one of their own. None: list them.")
    ] = "",
    leases: Annotated[str, typer.Option("--leases", metavar="N", help="Live at the same time.")] = "",
    cpus: Annotated[str, typer.Option("--cpus", metavar="N", help="Of all live leases together.")] = "",
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="Likewise.")] = "",
    gpus: Annotated[str, typer.Option("--gpus", metavar="N", help="Likewise.")] = "",
    slot: Annotated[str, typer.Option("--slot", metavar="TIME", help="Of one grant, and of one renewal.")] = "",
    total: Annotated[str, typer.Option("--total", metavar="TIME", help="Of one lease with all its renewals.")] = "",
    ahead: Annotated[str, typer.Option("--ahead", metavar="TIME", help="Until a reservation begins [at first 14d].")] = "",
    guaranteed: Annotated[
        str,
        typer.Option("--guaranteed", metavar="TIME", help="Before a lease may be preempted within a slot [at first: never]."),
    ] = "",
    idle_shrink: Annotated[
        str, typer.Option("--idle-shrink", metavar="TIME", help="After so long idle (CPU and GPU) cut its CPU, for now.")
    ] = "",
    idle_warn: Annotated[str, typer.Option("--idle-warn", metavar="TIME", help="After so long idle tell its holder.")] = "",
    idle_reclaim: Annotated[str, typer.Option("--idle-reclaim", metavar="TIME", help="After so long idle end it.")] = "",
    idle_chance: Annotated[
        str,
        typer.Option(
            "--idle-chance", metavar="SHARE", help="End it earlier, when it is needed within 10 min with at most this chance."
        ),
    ] = "",
    unset: Annotated[bool, typer.Option("--unset", help="Take its own policy away.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Say what a tenant may hold, for how long, and what may be done to its leases; or list what was said.

    Each option takes "none" for no bound; those left out stay as they are. What is held already stays held.
    """
    from tenure import verbs
    from tenure.resources import parse_bytes, parse_duration

    given = (
        ("max_leases", leases, int),
        ("max_cpus", cpus, float),
        ("max_memory_bytes", memory, parse_bytes),
        ("max_gpus", gpus, float),
        ("max_slot_s", slot, parse_duration),
        ("max_total_s", total, parse_duration),
        ("max_ahead_s", ahead, parse_duration),
        ("guaranteed_s", guaranteed, parse_duration),
        ("idle_shrink_s", idle_shrink, parse_duration),
        ("idle_warn_s", idle_warn, parse_duration),
        ("idle_reclaim_s", idle_reclaim, parse_duration),
        ("idle_chance", idle_chance, float),
    )
    changes = {field: _bound(text, parse) for field, text, parse in given if text}
    if not tenant and (changes or unset):
        raise SpecError("whose policy? Name a tenant, or '*' for all who have none of their own")
    if tenant and (changes or unset):
        verbs.set_policy(tenant, home=home, unset=unset, **changes)
    known = {name: policy for name, policy in verbs.policies(home=home).items() if tenant in ("", name)}
    output.say(output.as_json(known) if json else policies_table(known), sys.stdout)


def _bound(text: str, parse: Callable[[str], Any]) -> Any:
    if text == "none":
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise SpecError(f"a number was expected, or none; found {text!r}") from error


def policies_table(known: Mapping[str, Policy]) -> str:
    """Return one row per bound that was set."""
    from dataclasses import fields

    from tenure.resources import format_bytes, format_duration

    def text(name: str, value: float) -> str:
        if name.endswith("_bytes"):
            return format_bytes(int(value))
        return format_duration(value) if name.endswith("_s") else f"{value:g}"

    rows = [
        (tenant, field.name.removesuffix("_bytes").removesuffix("_s"), text(field.name, value))
        for tenant, policy in sorted(known.items())
        for field in fields(policy)
        if (value := getattr(policy, field.name)) is not None
    ]
    return output.table(("TENANT", "BOUND", "VALUE"), rows, empty="no policies: nobody is bound")


def workspace_text(held: Lease, url: str = "", nodes: Sequence[Node] = ()) -> str:
    """Return what a holder needs to know of a new lease: what it is, until when, how to get in. url: of its JupyterLab.

    nodes: of which it may hold devices.
    """
    from tenure.leases import LeaseState

    lease_id = output.clean(held.id)
    lines = [f"lease    {lease_id} on {output.clean(held.node or 'no node yet')}: {held.envelope.describe()}"]
    if held.state is LeaseState.RESERVED:
        lines.append(f"begins   {output.when(held.starts_at_s)} UTC; its room is kept from then on")
        lines.append(f"give up  tenure release {lease_id}")
        return "\n".join(lines)
    return "\n".join(
        [
            *lines,
            f"until    {output.when(held.ends_at_s)} UTC; renewable until {output.when(held.total_ends_at_s)} UTC",
            *([f"gpu      {output.clean(output.gpu_text(held, nodes, at_length=True))}"] if held.devices else []),
            *([f"open     {output.clean(url)}"] if url else []),
            f"get in   tenure exec -it {lease_id} -- bash",
            f"home     {output.clean(held.command.workdir)}; it stays when the lease ends",
            f"output   tenure logs {lease_id} -f",
            f"longer   tenure renew {lease_id} --for 2h",
            f"give up  tenure release {lease_id}",
        ]
    )


def top_table(seen: Sequence[Watched]) -> str:
    """Return one row per live lease: what it uses of what it may."""
    from tenure.resources import show_bytes

    rows = []
    for watched in seen:
        held, used = watched.lease, watched.usage
        rows.append(
            (
                held.id,
                held.tenant,
                f"{held.stage}/{held.worker}",
                str(held.state),
                held.node or "-",
                f"{watched.cpus:.2f} of {held.envelope.cpus:g}" if used else f"- of {held.envelope.cpus:g}",
                f"{show_bytes(used.memory_bytes) if used else '-'} of {show_bytes(held.envelope.memory_bytes)}",
                f"{used.gpu_busy:.0%} of {held.envelope.gpus:g}" if used and held.envelope.gpus else "-",
                str(used.processes) if used else "-",
                _left(watched.left_s),
            )
        )
    heads = ("LEASE", "TENANT", "STAGE/WORKER", "STATE", "NODE", "CPUS", "MEMORY", "GPU", "PROCESSES", "LEFT")
    return output.table(heads, rows, empty="no live leases")


def _until(held: Lease) -> str:
    lease_id, ends = output.clean(held.id), output.when(held.ends_at_s)
    last = "; that is its total" if held.ends_at_s >= held.total_ends_at_s - 1e-3 else ""
    return f"lease {lease_id} ends {ends} UTC{last}"


def _left(left_s: float) -> str:
    minutes, seconds = divmod(int(left_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}min"
    return f"{minutes}min{seconds:02d}s" if minutes else f"{seconds}s" if left_s else "-"
