"""What the broker knows, as metrics for Prometheus: itself, its nodes, its queue, every live lease.

All of it comes from memory: reading it asks no node and no database. Not here: the endpoint (`metrics_door`), the text
(`meter.exposition`), what was measured of runs and kept (`ledger`). docs/metering.md lists every metric.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from tenure.broker.book import Book
from tenure.broker.nodes import Nodes
from tenure.leases import Lease, LeaseState
from tenure.meter.exposition import Family, Metric, expose, usage_families, usage_metrics
from tenure.nodes import NodeState
from tenure.resources import Envelope

LEASE_LABELS = ("lease", "tenant", "run", "stage", "worker", "node")
_NODE = ("node",)
_WAITING = (LeaseState.REQUESTED, LeaseState.QUEUED)

BROKER_FENCE = Metric("tenure_broker_fence", "Number of this broker; the next one's is higher.")
BROKER_CLIENTS = Metric("tenure_broker_clients", "Connections of clients.")
BROKER_CPU = Metric("tenure_broker_cpu_seconds_total", "CPU time of the broker itself, user and system.")
BROKER_START = Metric("tenure_broker_start_timestamp_seconds", "When this broker started, seconds since 1970 UTC.")
LEDGER_REFUSALS = Metric("tenure_ledger_refusals_total", "Writes that the ledger refused, e.g. for a full disk.")

NODE_UP = Metric("tenure_node_up", "1 where the node answers, 0 where it does not.", _NODE)
NODE_STATE = Metric("tenure_node_state", "1 for the state that the node is in.", ("node", "state"))
NODE_CPUS = Metric("tenure_node_cpus", "Cores that the node offers.", _NODE)
NODE_MEMORY = Metric("tenure_node_memory_bytes", "Memory that the node offers.", _NODE)
NODE_GPUS = Metric("tenure_node_gpus", "GPU devices that the node offers.", _NODE)
NODE_HELD_CPUS = Metric("tenure_node_held_cpus", "Cores of the node that leases hold.", _NODE)
NODE_HELD_MEMORY = Metric("tenure_node_held_memory_bytes", "Memory of the node that leases hold.", _NODE)
NODE_HELD_GPUS = Metric("tenure_node_held_gpus", "GPU devices of the node that leases hold, fractions added up.", _NODE)

LEASES = Metric("tenure_leases", "Live leases.", ("tenant", "state"))
LEASES_ENDED = Metric("tenure_leases_ended_total", "Leases that ended since this broker started.", ("tenant", "reason"))
QUEUE_LEASES = Metric("tenure_queue_leases", "Leases that wait for room.", ("tenant",))
QUEUE_CPUS = Metric("tenure_queue_cpus", "Cores that waiting leases ask for.", ("tenant",))
QUEUE_MEMORY = Metric("tenure_queue_memory_bytes", "Memory that waiting leases ask for.", ("tenant",))
QUEUE_WAIT = Metric("tenure_queue_oldest_wait_seconds", "How long the lease has waited that waits longest; 0: none waits.")

LEASE_CPUS = Metric("tenure_lease_limit_cpus", "Cores that the lease may use.", LEASE_LABELS)
LEASE_MEMORY = Metric("tenure_lease_limit_memory_bytes", "Memory that the lease may use.", LEASE_LABELS)
LEASE_GPUS = Metric("tenure_lease_limit_gpus", "GPU devices of the lease, or its part of one.", LEASE_LABELS)
LEASE_GPU_MEMORY = Metric("tenure_lease_limit_gpu_memory_bytes", "Memory that it may use of each device.", LEASE_LABELS)
LEASE_END = Metric("tenure_lease_end_timestamp_seconds", "When its present slot ends, seconds since 1970 UTC.", LEASE_LABELS)
LEASE_PROPOSED_CPUS = Metric("tenure_lease_proposed_cpus", "Cores that its use speaks for (right-sizing).", LEASE_LABELS)
LEASE_PROPOSED_MEMORY = Metric(
    "tenure_lease_proposed_memory_bytes", "Memory that its use speaks for (right-sizing).", LEASE_LABELS
)

METRICS = (
    *(BROKER_FENCE, BROKER_CLIENTS, BROKER_CPU, BROKER_START, LEDGER_REFUSALS),
    *(NODE_UP, NODE_STATE, NODE_CPUS, NODE_MEMORY, NODE_GPUS, NODE_HELD_CPUS, NODE_HELD_MEMORY, NODE_HELD_GPUS),
    *(LEASES, LEASES_ENDED, QUEUE_LEASES, QUEUE_CPUS, QUEUE_MEMORY, QUEUE_WAIT),
    *(LEASE_CPUS, LEASE_MEMORY, LEASE_GPUS, LEASE_GPU_MEMORY, LEASE_END, LEASE_PROPOSED_CPUS, LEASE_PROPOSED_MEMORY),
    *usage_metrics("tenure_lease", LEASE_LABELS),
)
"""Every metric that there is, in the order in which it is exposed."""


class Metrics:
    """The broker's figures at this moment. `proposed` gives the right-sizing proposals by lease id."""

    def __init__(
        self,
        book: Book,
        nodes: Nodes,
        *,
        fence: int,
        clients: Callable[[], int],
        proposed: Callable[[], Mapping[str, Envelope]] = dict,
    ) -> None:
        self._book, self._nodes, self._fence, self._clients, self._proposed = book, nodes, fence, clients, proposed
        self._started_s = book.clock.utc_s()

    def text(self) -> bytes:
        """Return all of it as Prometheus text."""
        families = {metric.name: Family(metric) for metric in METRICS}

        def add(metric: Metric, value: float, *labels: str) -> None:
            families[metric.name].add(value, *labels)

        self._broker(add)
        self._node(add)
        self._queue(add)
        self._lease(add)
        used = {
            _labels(self._book.live[lease_id]): usage
            for lease_id, usage in self._book.usage.items()
            if lease_id in self._book.live and self._book.live[lease_id].holds
        }
        families.update((family.metric.name, family) for family in usage_families("tenure_lease", LEASE_LABELS, used))
        return expose(families.values())

    def _broker(self, add: Callable[..., None]) -> None:
        add(BROKER_FENCE, self._fence)
        add(BROKER_CLIENTS, self._clients())
        add(BROKER_CPU, time.process_time())
        add(BROKER_START, self._started_s)
        add(LEDGER_REFUSALS, self._book.ledger.refusals)

    def _node(self, add: Callable[..., None]) -> None:
        gpus: dict[str, float] = {}
        for lease in self._book.live.values():
            if lease.holds:
                gpus[lease.node] = gpus.get(lease.node, 0.0) + lease.envelope.gpus
        listed = self._nodes.listed()
        for node in listed:
            add(NODE_UP, float(self._nodes.is_up(node.name)), node.name)
            for state in NodeState:
                add(NODE_STATE, float(state is node.state), node.name, str(state))
            add(NODE_CPUS, node.capacity.cpus, node.name)
            add(NODE_MEMORY, node.capacity.memory_bytes, node.name)
            add(NODE_GPUS, len(node.capacity.gpus), node.name)
            add(NODE_HELD_CPUS, node.held_cpus, node.name)
            add(NODE_HELD_MEMORY, node.held_memory_bytes, node.name)
            add(NODE_HELD_GPUS, gpus.get(node.name, 0.0), node.name)
        for name in set(self._nodes.why_unreached()) - {node.name for node in listed}:
            add(NODE_UP, 0.0, name)  # never reached: nobody knows what it offers

    def _queue(self, add: Callable[..., None]) -> None:
        counts: dict[tuple[str, str], int] = {}
        waiting: dict[str, list[Lease]] = {}
        for lease in self._book.live.values():
            counts[lease.tenant, str(lease.state)] = counts.get((lease.tenant, str(lease.state)), 0) + 1
            waiting.setdefault(lease.tenant, [])
            if lease.state in _WAITING:
                waiting[lease.tenant].append(lease)
        for labels, count in counts.items():
            add(LEASES, count, *labels)
        for labels, count in self._book.ended.items():
            add(LEASES_ENDED, count, *labels)
        for tenant, leases in waiting.items():
            add(QUEUE_LEASES, len(leases), tenant)
            add(QUEUE_CPUS, sum(lease.envelope.cpus for lease in leases), tenant)
            add(QUEUE_MEMORY, sum(lease.envelope.memory_bytes for lease in leases), tenant)
        now_s = self._book.clock.utc_s()
        asked = [lease.requested_at_s for leases in waiting.values() for lease in leases]
        add(QUEUE_WAIT, max(0.0, now_s - min(asked, default=now_s)))

    def _lease(self, add: Callable[..., None]) -> None:
        proposed = self._proposed()
        for lease in self._book.live.values():
            if not lease.holds:
                continue
            labels, envelope = _labels(lease), lease.envelope
            add(LEASE_CPUS, envelope.cpus, *labels)
            add(LEASE_MEMORY, envelope.memory_bytes, *labels)
            add(LEASE_GPUS, envelope.gpus, *labels)
            add(LEASE_GPU_MEMORY, envelope.gpu_memory_bytes, *labels)
            add(LEASE_END, lease.ends_at_s, *labels)
            if lease.id in proposed:
                add(LEASE_PROPOSED_CPUS, proposed[lease.id].cpus, *labels)
                add(LEASE_PROPOSED_MEMORY, proposed[lease.id].memory_bytes, *labels)


def _labels(lease: Lease) -> tuple[str, ...]:
    return (lease.id, lease.tenant, lease.run_id, lease.stage, str(lease.worker), lease.node)
