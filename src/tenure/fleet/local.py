"""Agents of this machine, over Unix sockets. Starts an agent when none answers. Not for: other machines (a later fleet)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tenure import codec, orders, wire
from tenure.agent.start import is_agent_alive, start_agent
from tenure.errors import NotFound, TenureError, Unavailable
from tenure.fleet.contract import OnAttempt, OnCut, Part
from tenure.nodes import Node
from tenure.sockets import AsyncLineClient, socket_dir

FIRST_TERM_S = 60.0
"""Of an agent that was just started, until it is given a term."""
LEAVE_MAX_S = 20.0
"""How long an agent may take to leave: it stops what still runs first."""


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

    def parts(self) -> tuple[Part, ...]:
        """See Fleet."""
        return tuple(self._parts[name] for name in self.names())

    def add(self, part: Part) -> None:
        """See Fleet."""
        self._parts[part.name] = part

    async def remove(self, node: str) -> None:
        """See Fleet. An agent whose connection is cut is left alone until it leaves by itself, when its term is over."""
        if node not in self._parts:
            return
        with contextlib.suppress(TenureError):
            await self.call(node, "shutdown", wire.Nothing(), timeout_s=5.0)
        end_s = asyncio.get_running_loop().time() + LEAVE_MAX_S
        while await asyncio.to_thread(is_agent_alive, self._home, node):
            if asyncio.get_running_loop().time() > end_s:
                raise Unavailable(
                    f"the agent of node {node} has not left within {LEAVE_MAX_S:g} s and keeps its part of the machine. "
                    f"Try again; its log is {self._home / 'nodes' / node / 'agent.log'}"
                )
            await asyncio.sleep(0.05)
        await self._hang_up(node)
        del self._parts[node]

    def listen(self, on_attempt: OnAttempt, on_cut: OnCut) -> None:
        """See Fleet."""
        self._on_attempt, self._on_cut = on_attempt, on_cut

    async def reach(self, node: str, *, term: Callable[[], orders.NodeTerm]) -> tuple[Node, orders.BootTime]:
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
                gpus=part.gpus,
                gpu_model=part.gpu_model,
                gpu_memory_bytes=part.gpu_memory_bytes,
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
                self._on_attempt(node, codec.from_builtins(data, orders.AttemptView))

        def closed() -> None:
            # One that was hung up on purpose, or never got as far as being used, is no cut.
            if box and self._clients.get(node) is box[0]:
                del self._clients[node]
                self._on_cut(node)

        client = AsyncLineClient(path, orders.AGENT_OPS, who="broker", on_note=note, on_close=closed)
        box.append(client)
        try:
            await client.connect(timeout_s=5.0)
        except BaseException:
            await client.close()
            raise
        return client
