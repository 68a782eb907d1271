"""The plan of a serving experiment: which settings there are, and in which order their cells run.

Every repeat runs every setting once, in an order drawn anew: a machine that slows down, or that somebody else uses for a
minute, then meets all settings alike, and what the repeats of two settings have in common falls out of their ratio. Pure: what
runs the cells is `sweep_nodes`, what becomes of them `sweep_trials`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenure.errors import SpecError
from tenure.serve.load.orders import copies
from tenure.sweeps import Sweep

OURS = "tenure"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One combination of factors."""

    architecture: str
    transport: str
    interaction: str
    batch: int
    data: str
    link: str
    server: str = OURS
    """Or a contender's name."""
    twin: int = 0
    """1: the same as the setting that differs in nothing else, to be run beside it."""
    runtime: str = "process"
    """What confines the server, where it is ours."""
    clients: int = 1
    """Applications that run its cells at the same time."""
    instances: int = 0
    """Of the model, wherever it is; 0: as the server chooses, and not a factor."""
    threads: int = 0
    """Of each instance."""
    max_delay_s: float = 0.0
    """How long a request may wait at the server for others to share its run."""

    @property
    def application(self) -> str:
        """Name of the standing application that runs its cells; of several, what they begin with."""
        boxed = "" if self.runtime == "process" else self.runtime
        parts = (self.architecture, self.server, boxed, self.transport, self.interaction)
        return "-".join(part for part in parts if part not in ("", "none"))

    @property
    def applications(self) -> tuple[str, ...]:
        """Names of all standing applications that run its cells."""
        return copies(self.application, self.clients)

    @property
    def far(self) -> bool:
        """Whether its application stands on the client's node."""
        return self.architecture == "distributed"

    def configuration(self) -> dict[str, Any]:
        """Return the factors as a trial carries them."""
        found: dict[str, Any] = {
            "architecture": self.architecture,
            "transport": self.transport,
            "interaction": self.interaction,
            "batch": self.batch,
            "clients": self.clients,
            "link": self.link,
            "server": self.server,
            "data": self.data,
            "load": "closed",
            "runtime": self.runtime,
        }
        if self.instances:
            found |= {"instances": self.instances, "threads": self.threads, "max_delay_s": self.max_delay_s}
        return found | ({"twin": 1} if self.twin else {})

    def describe(self) -> str:
        """Return it in words, for progress and errors."""
        boxed = [] if self.runtime == "process" else [f"({self.runtime})"]
        words = [self.architecture, *([] if self.server == OURS else [self.server]), *boxed, self.transport, self.interaction]
        text = f"{' '.join(word for word in words if word != 'none')}, batch {self.batch}"
        if self.instances:
            text += f", {self.instances} x {self.threads} threads, delay {self.max_delay_s * 1e3:g} ms"
        text += f", {self.clients} clients" if self.clients > 1 else ""
        return f"{text}, from {self.data}{' (twin)' if self.twin else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Another server, already running, to be put in the same table."""

    name: str
    targets: Mapping[str, str]
    """Transport -> ``http://host:port`` or ``grpc://host:port``."""
    model: str
    """Name of the model there."""
    pids: tuple[int, ...] = ()
    """Of its processes, where it is on this machine."""
    link: str = "loopback"
    """To it; ``network`` where it is on another machine."""

    def __post_init__(self) -> None:
        if self.name == OURS or not self.name or not self.targets:
            raise SpecError(f"a contender needs a name of its own and at least one address; found {self.name!r}")


def settings(
    sweep: Sweep,
    *,
    files: bool,
    fixed_batch: int = 0,
    far_link: str = "netns",
    contenders: Sequence[Contender] = (),
) -> tuple[Setting, ...]:
    """Return the settings of an experiment, in the order of its factors; twins behind what they repeat.

    files: there are pictures to read. fixed_batch: the only one that the model takes, 0 for any. far_link: what joins the two
    nodes. Raises SpecError when nothing is left.
    """
    if contenders and sweep.undisturbed:
        raise SpecError(
            "undisturbed is not for contenders: they run outside of the leases that go first, and would have to wait"
        )
    if "container" in sweep.runtimes and sweep.undisturbed:
        raise SpecError("undisturbed is not for containers: the engine's control groups are not the lease's to weigh")
    batches = [batch for batch in sweep.batches if fixed_batch in (0, batch)]
    if not batches:
        raise SpecError(
            f"the model takes {fixed_batch} image{'s' if fixed_batch > 1 else ''} at a time, and sweep.batches is "
            f"{list(sweep.batches)}: put {fixed_batch} in it, or export the model with a first dimension of any length"
        )
    data = [each for each in sweep.data if each == "memory" or files]
    if not data:
        raise SpecError('sweep.data is ["files"], and there are no pictures: name a folder as inputs.images')
    found = [
        Setting(
            architecture=architecture,
            transport=transport,
            interaction=interaction,
            batch=batch,
            data=each,
            link=link,
            server=server,
            runtime=runtime,
        )
        for architecture, transport, link, server, runtime in _places(sweep, far_link, contenders)
        for interaction, each, batch in itertools.product(sweep.interactions, data, batches)
    ]
    if not found:
        raise SpecError("no setting is left: shared memory is for the microservice alone, and not for a container")
    if sweep.twins:
        first = found[0]
        twins = [_twin(each) for each in found if each.application == first.application and each.data == first.data]
        found += twins
    return tuple(found)


def order(all_settings: Sequence[Setting], sweep: Sweep, seed: int) -> Iterator[tuple[int, Setting]]:
    """Yield (repeat, setting): each visit of each repeat is all settings, shuffled. The same for the same seed."""
    chance = random.Random(seed)
    for repeat, _ in itertools.product(range(sweep.repeats), range(sweep.visits)):
        mixed = list(all_settings)
        chance.shuffle(mixed)
        yield from ((repeat, setting) for setting in mixed)


def in_flight(sweep: Sweep, setting: Setting) -> int:
    """Return how many requests of a setting are on their way at once."""
    return 1 if setting.interaction == "sync" else places(sweep, setting.batch)


def places(sweep: Sweep, batch: int) -> int:
    """Return how many requests an asynchronous application has on their way at once."""
    return min(sweep.in_flight, max(2, sweep.images_in_flight // batch))


def fresh(planned: Sequence[Setting]) -> dict[Setting, Setting]:
    """Return, for each setting, the one whose fresh server tells its memory: the same, or that with other data. No twins."""
    first: dict[tuple[str, int], Setting] = {}
    for setting in planned:
        if not setting.twin and setting.server == OURS:
            first.setdefault((setting.application, setting.batch), setting)
    return {each: first[each.application, each.batch] for each in planned if each.server == OURS}


def _places(sweep: Sweep, far_link: str, contenders: Sequence[Contender]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield architecture, transport, link, server and what confines it."""
    links = {"simple": "in-process", "microservice": "loopback", "distributed": far_link}
    for architecture in sweep.architectures:
        if architecture == "simple":
            yield architecture, "none", links[architecture], OURS, "process"
            continue
        for transport, runtime in itertools.product(sweep.transports, sweep.runtimes):
            if transport != "shm" or (architecture == "microservice" and runtime == "process"):
                yield architecture, transport, links[architecture], OURS, runtime
    for contender in contenders:
        for transport in contender.targets:
            yield "microservice", transport, contender.link, contender.name, "process"


def _twin(setting: Setting) -> Setting:
    return Setting(
        **{name: getattr(setting, name) for name in Setting.__dataclass_fields__ if name != "twin"},
        twin=1,
    )
