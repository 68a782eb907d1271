"""`tenure tenants`: who shares a home, and who looks after it. Not here: quotas (`tenure quota`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tenure.cli import output
from tenure.cli.leasing import Home, Json

if TYPE_CHECKING:  # the nouns cost 60 ms, which `tenure --help` need not pay
    from tenure.tenants import TenantView

app = typer.Typer(
    name="tenants",
    help="Who shares this machine's home (tenure up --shared), and who looks after it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="A user of this machine, by name.")]


@app.command("list")
def list_(home: Home = None, json: Json = False) -> None:
    """List tenants: role, and what each holds now, waiting leases included. A tenant that is no admin sees itself alone."""
    from tenure import verbs

    found = verbs.tenants(home=home)
    output.say(output.as_json(found) if json else tenants_table(found), sys.stdout)


@app.command("role")
def role(
    tenant: TenantArgument,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="admin, or tenant.")],
    home: Home = None,
    json: Json = False,
) -> None:
    """Have a user be an admin: see, end, renew and resize everybody's leases, set quotas and roles, add and remove nodes.

    Running something inside a lease stays with its tenant, and root. For admins and root.
    """
    from tenure import verbs

    verbs.set_role(tenant, role, home=home)
    output.say(output.as_json({"tenant": tenant, "role": role}) if json else f"{tenant} is {role} from now on", sys.stdout)


@app.command("remove")
def remove(tenant: TenantArgument, home: Home = None, json: Json = False) -> None:
    """Have the name of a user who is gone be free, so that another user of that name is let in. For admins and root.

    Refused while runs or the home volume of the old one are kept: the next would have them.
    """
    from tenure import verbs

    verbs.remove_tenant(tenant, home=home)
    output.say(output.as_json({"removed": tenant}) if json else f"the name {tenant} is free", sys.stdout)


def tenants_table(found: Sequence[TenantView]) -> str:
    """Return one row per tenant."""
    from tenure.resources import show_bytes

    rows = [
        (
            view.member.tenant,
            str(view.member.uid),
            str(view.member.role),
            str(view.leases),
            f"{view.cpus:g}",
            show_bytes(view.memory_bytes),
        )
        for view in found
    ]
    return output.table(("TENANT", "UID", "ROLE", "LEASES", "CPUS", "MEMORY"), rows, empty="no tenant has held anything yet")
