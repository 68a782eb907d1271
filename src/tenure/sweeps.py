"""How a serving stage is measured: every setting of a sweep, or the few settings that a search asks for."""

from __future__ import annotations

from dataclasses import dataclass

from tenure.errors import SpecError
from tenure.links import parse_link

ARCHITECTURES = ("simple", "microservice", "distributed")
INTERACTIONS = ("sync", "async")
TRANSPORTS = ("http", "grpc", "shm")
RUNTIMES = ("process", "container")
DATA = ("memory", "files")
NORMALISATIONS = ("", "none", "unit", "signed", "imagenet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """An experiment of a serving stage: every combination of these, in one random order, again and again."""

    architectures: tuple[str, ...] = ARCHITECTURES
    interactions: tuple[str, ...] = INTERACTIONS
    transports: tuple[str, ...] = TRANSPORTS
    """Shared memory is for the microservice alone, and not for a container."""
    runtimes: tuple[str, ...] = ("process",)
    """What confines the server of microservice and distributed; with `container`, each server has a lease of its own."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Images of one request; those that the model's shape does not take are left out, and the report says so."""
    data: tuple[str, ...] = DATA
    """`files`: each request's pictures are read and decoded by the application; needs inputs.images."""
    repeats: int = 20
    max_s: float = 0.0
    """No repeat begins that would end later than this, counted from the first; two are measured at least. 0: no bound."""
    cell_s: float = 0.5
    """How long one visit to a setting takes at least."""
    visits: int = 1
    """To each setting in each repeat, added up: more and shorter ones meet a restless machine more alike."""
    in_flight: int = 8
    """Requests of an asynchronous application that are on their way at once."""
    images_in_flight: int = 64
    """Fewer requests are on their way when their images would be more than this, two at least."""
    images: int = 64
    """Pictures used, the first by name."""
    twins: bool = True
    """Measure the first setting of each batch twice in every repeat: what the machine does to a ratio whose truth is 1."""
    undisturbed: bool = False
    """Both leases go before everything else on this machine, as far as their own cores go: others get what is left."""
    fresh: bool = True
    """Measure memory by a server and an application that have run nothing else, once per setting, before the repeats."""
    client_cpus: float = 0.0
    """Cores of the distributed application's node; 0: half of what is free. The rest is the server's node."""
    against: tuple[str, ...] = ()
    """Servers of others that already run, ``http://`` or ``grpc://HOST:PORT``, measured in the same order and table."""
    link: str = ""
    """Between the two nodes, such as ``rate=1Gbit,delay=20ms``; empty: as fast as the machine."""
    normalise: str = ""
    """What a model that takes floats was trained on: none, unit, signed or imagenet."""
    crop: float = 0.875
    size: int = 0
    """Height and width, for a model that takes any."""

    def __post_init__(self) -> None:
        for name, known in (("architectures", ARCHITECTURES), ("interactions", INTERACTIONS), ("transports", TRANSPORTS)):
            _check_levels(f"sweep.{name}", getattr(self, name), known)
        _check_levels("sweep.data", self.data, DATA)
        _check_levels("sweep.runtimes", self.runtimes, RUNTIMES)
        if (
            not self.batches
            or len(set(self.batches)) < len(self.batches)
            or not 1 <= min(self.batches) <= max(self.batches) <= 4096
        ):
            raise SpecError(f"sweep.batches must be different sizes from 1 to 4096; found {list(self.batches)}")
        if not 1 <= self.repeats <= 1000:
            raise SpecError(f"sweep.repeats must lie between 1 and 1000; found {self.repeats!r}")
        if not 0.05 <= self.cell_s <= 600:
            raise SpecError(f"sweep.cell must lie between 50 ms and 600 s; found {self.cell_s!r} s")
        if not 1 <= self.visits <= 1000:
            raise SpecError(f"sweep.visits must lie between 1 and 1000; found {self.visits!r}")
        if not 1 <= self.in_flight <= 256 or not 1 <= self.images_in_flight <= 65536:
            raise SpecError("sweep.in_flight must lie between 1 and 256, sweep.images_in_flight between 1 and 65,536")
        if not 1 <= self.images <= 100_000:
            raise SpecError(f"sweep.images must lie between 1 and 100,000; found {self.images!r}")
        if self.client_cpus < 0:
            raise SpecError(f"sweep.client_cpus must not be negative; found {self.client_cpus!r}")
        if self.normalise not in NORMALISATIONS:
            raise SpecError(f"sweep.normalise must be one of {', '.join(NORMALISATIONS[1:])}; found {self.normalise!r}")
        parse_link(self.link)


SEARCHED = ("simple", "microservice")
"""Architectures that can be leased on one node, and so searched."""
BEST = ("", "rate", "cost")
MAX_LEVELS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Which settings of a serving stage are searched for its goals, and how much measuring that may take."""

    architectures: tuple[str, ...] = SEARCHED
    interactions: tuple[str, ...] = INTERACTIONS
    transports: tuple[str, ...] = TRANSPORTS
    batches: tuple[int, ...] = (1, 8, 32)
    """Images of one request; those that the model's shape does not take are left out."""
    instances: tuple[int, ...] = ()
    """Loaded copies of the model; empty: 1, 2, 4 … up to the node's cores."""
    threads: tuple[int, ...] = ()
    """Of each instance; empty: 1, 2, 4 … Only where instances x threads stay within the node's cores."""
    max_delays_s: tuple[float, ...] = (0.0, 0.003)
    """How long a request may wait at the server for others to share its run."""
    best: str = ""
    """What is best among settings that meet a goal: `rate`, the most images/s, or `cost`, the cheapest leases. Empty: cost for
    a goal that says how many images/s are needed, rate for others."""
    trials: int = 10
    """Settings measured for each goal at most."""
    max_s: float = 0.0
    """No trial begins later than this, counted from the first; 0: no bound."""
    repeats: int = 3
    """Of the load in each trial."""
    cell_s: float = 0.5
    """How long each repeat takes at least."""
    in_flight: int = 8
    """Requests of an asynchronous application that are on their way at once."""
    images_in_flight: int = 64
    """Fewer requests are on their way when their images would be more than this, two at least."""
    images: int = 64
    """Pictures or examples used, the first by name."""
    normalise: str = ""
    """What a model that takes floats was trained on: none, unit, signed or imagenet."""
    crop: float = 0.875
    size: int = 0
    """Height and width, for a model that takes any."""

    def __post_init__(self) -> None:
        for name, known in (("architectures", SEARCHED), ("interactions", INTERACTIONS), ("transports", TRANSPORTS)):
            _check_levels(f"search.{name}", getattr(self, name), known)
        for name, most, some in (("batches", 4096, True), ("instances", 64, False), ("threads", 256, False)):
            found = getattr(self, name)
            if (some and not found) or len(set(found)) < len(found) or not all(1 <= level <= most for level in found):
                raise SpecError(f"search.{name} must be different numbers from 1 to {most}; found {list(found)}")
            if len(found) > MAX_LEVELS:
                raise SpecError(f"search.{name} may be {MAX_LEVELS} numbers at most; found {len(found)}")
        delays_s = self.max_delays_s
        if not delays_s or len(set(delays_s)) < len(delays_s) or not all(0 <= delay_s <= 10 for delay_s in delays_s):
            raise SpecError(f"search.max_delays must be different times from 0 to 10 s; found {list(delays_s)} s")
        if self.best not in BEST:
            raise SpecError(f"search.best must be one of {', '.join(BEST[1:])}, or left out; found {self.best!r}")
        if not 1 <= self.trials <= 200:
            raise SpecError(f"search.trials must lie between 1 and 200; found {self.trials!r}")
        if not 1 <= self.repeats <= 100:
            raise SpecError(f"search.repeats must lie between 1 and 100; found {self.repeats!r}")
        self.as_sweep()

    def as_sweep(self) -> Sweep:
        """Return what a sweep would be told of how to load: pictures, cells, requests in flight. Raises SpecError."""
        try:
            return Sweep(
                architectures=self.architectures,
                interactions=self.interactions,
                transports=self.transports,
                batches=self.batches,
                data=("memory",),
                repeats=self.repeats,
                cell_s=self.cell_s,
                in_flight=self.in_flight,
                images_in_flight=self.images_in_flight,
                images=self.images,
                normalise=self.normalise,
                crop=self.crop,
                size=self.size,
                twins=False,
                fresh=False,
            )
        except SpecError as error:
            raise SpecError(str(error).replace("sweep.", "search.")) from error


def _check_levels(name: str, found: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not found or len(set(found)) < len(found) or not set(found) <= set(known):
        raise SpecError(f"{name} must be one or more of {', '.join(known)}; found {list(found)}")
