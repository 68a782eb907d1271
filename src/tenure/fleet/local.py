"""Agents of this machine, over Unix sockets. Starts an agent when none answers. Not for: other machines (a later fleet)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenure import wire
from tenure.agent.start import start_agent
from tenure.errors import NotFound, Unavailable
from tenure.fleet.contract import OnAttempt, OnCut
from tenure.nodes import Node
from tenure.sockets import AsyncLineClient, socket_dir
from tenure.tenants import check_name

FIRST_TERM_S = 60.0
"""Of an agent that was just started, until it is given a term."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One agent to be: a name, and which part of the machine it offers (None: all that is left)."""

    name: str = "local"
    cpus: float | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        check_name("node", self.name)


class LocalFleet:
    """Agents that share this machine. Implements `contract.Fleet`."""

    def __init__(self, home: Path, parts: Sequence[Part] = (Part(),), *, confine: str = "auto") -> None:
        self._home, self._confine = home, confine
        self._parts = {part.name: part for part in parts}
        self._clients: dict[str, AsyncLineClient] = {}
        self._on_attempt: OnAttempt = lambda node, view: None
        self._on_cut: OnCut = lambda node: None

    def names(self) -> tuple[str, ...]:
        """See Fleet."""
        return tuple(sorted(self._parts))

    def listen(self, on_attempt: OnAttempt, on_cut: OnCut) -> None:
        """See Fleet."""
        self._on_attempt, self._on_cut = on_attempt, on_cut

    async def reach(self, node: str, *, term: Callable[[], wire.NodeTerm]) -> tuple[Node, wire.BootTime]:
        """See Fleet."""
        part = self._parts.get(node)
        if part is None:
            raise NotFound(f"node {node!r} does not exist; this fleet has {', '.join(self.names())}")
        await self._hang_up(node)
        path = socket_dir(self._home) / f"agent-{node}.sock"
        try:
            client = await self._connect(node, path)
        except Unavailable:
            await asyncio.to_thread(
                start_agent,
                self._home,
                node,
                path,
                term_s=FIRST_TERM_S,
                cpus=part.cpus,
                memory_bytes=part.memory_bytes,
                confine=self._confine,
            )
            client = await self._connect(node, path)
        try:
            boot = await client.call("term", term(), timeout_s=10.0)
            described = await client.call("describe", wire.Nothing(), timeout_s=10.0)
        except BaseException:
            await client.close()
            raise
        self._clients[node] = client
        return described, boot

    async def call(self, node: str, op: str, args: Any, *, timeout_s: float = 10.0) -> Any:
        """See Fleet."""
        client = self._clients.get(node)
        if client is None:
            raise Unavailable(f"node {node} is not connected; the broker tries again by itself")
        return await client.call(op, args, timeout_s=timeout_s)

    async def close(self) -> None:
        """See Fleet."""
        for node in list(self._clients):
            await self._hang_up(node)

    async def _hang_up(self, node: str) -> None:
        client = self._clients.pop(node, None)
        if client is not None:
            await client.close()

    async def _connect(self, node: str, path: Path) -> AsyncLineClient:
        box: list[AsyncLineClient] = []

        def note(name: str, data: Any) -> None:
            if name == "attempt":
                self._on_attempt(node, wire.from_builtins(data, wire.AttemptView))

        def closed() -> None:
            # One that was hung up on purpose, or never got as far as being used, is no cut.
            if box and self._clients.get(node) is box[0]:
                del self._clients[node]
                self._on_cut(node)

        client = AsyncLineClient(path, wire.AGENT_OPS, who="broker", on_note=note, on_close=closed)
        box.append(client)
        try:
            await client.connect(timeout_s=5.0)
        except BaseException:
            await client.close()
            raise
        return client
