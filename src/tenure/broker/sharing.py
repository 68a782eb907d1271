"""Sharing a home with all users of a machine: what `tenure up --shared` does besides, before and after the broker's start.

Not here: what a shared home is (`homes`), who may do what in it (`roles`).
"""

from __future__ import annotations

import os
import pwd
from contextlib import suppress
from pathlib import Path

from tenure import homes
from tenure.broker.client import BrokerClient, connect
from tenure.broker.tenancy import tenant_name
from tenure.errors import Conflict, Unavailable
from tenure.tenants import EVERYBODY, Policy, Role

FIRST_MAX_LEASES = 64
"""What a tenant may hold at the same time where nobody has said anything else: no one fills the queue for all."""


def share(home: str | Path | None) -> Path:
    """Have a home be shared; return it. None: $TENURE_HOME, else `homes.SYSTEM_HOME`.

    Raises Refused for others than root, Conflict while a broker serves its owner alone there, or others could replace it.
    """
    found = Path(home or os.environ.get("TENURE_HOME") or homes.SYSTEM_HOME).expanduser().absolute()
    if found.exists() and not homes.is_shared(found) and os.geteuid() == 0:
        homes.check_owner(found)
        with suppress(Unavailable):
            connect(found, start=False, who="cli:up").close()
            raise Conflict(
                f'the broker of {found} serves root alone. "tenure down" ends it with its leases; then share the home'
            )
    homes.share(found)
    return found


def settle(client: BrokerClient) -> None:
    """Give a home that was shared just now its first admin, the user who became root for it, and a first bound for all."""
    if not any(view.member.role is Role.ADMIN for view in client.tenants()):
        with suppress(KeyError, ValueError):
            uid = int(os.environ["SUDO_UID"])
            pwd.getpwuid(uid)
            if uid != 0:
                client.set_role(tenant_name(uid), Role.ADMIN)
    if EVERYBODY not in client.policies():
        client.set_policy(EVERYBODY, Policy(max_leases=FIRST_MAX_LEASES))
