"""Placement rules by name: which of the nodes with room takes a lease. `tenure` is the broker's; others compare.

Each gives a gain per candidate and an order of nodes that decides between equals; a constant `step` charges for each node
further on in that order. What fits is the same for all of them. `fgd` is the published rule (Weng et al., USENIX ATC'23) after
its artefact: the shapes that cover 95 % of requests, those without a GPU among them, memory not looked at; scores in whole
hundredths, ties by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenure.errors import SpecError
from tenure.resources import Capacity

from .shapes import MICRO, STEP, Shape, micro, node_order

if TYPE_CHECKING:  # NumPy, which a fleet without GPUs has no use for
    import numpy as np
    from numpy.typing import NDArray

    from .mix import Mix


COVERED = 0.95
"""Share of the requests that the shapes of `fgd` cover."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One placement rule."""

    name: str
    means: str
    """For people: where a lease goes."""
    step: float = 0.0
    """What each node further on in the order costs, in MICRO x MICRO of a device."""
    about_gpus: bool = True
    """Whether it has nothing to say on nodes without GPUs; best fit by memory decides there."""

    def order(self, capacities: Mapping[str, Capacity]) -> list[str]:
        """Return the nodes in the order that decides between equals."""
        return node_order(capacities) if self.name == "tenure" else sorted(capacities)

    def mix(self, counts: Mapping[Shape, float]) -> Mix:
        """Return the requests that a fleet lives on, weighed as this rule does. counts: how often each shape is asked for."""
        from .mix import Mix

        return _published_mix(counts) if self.name == "fgd" else Mix(counts)

    def gains(
        self,
        mix: Mix,
        cpus: NDArray[np.float64],
        memory_bytes: NDArray[np.float64],
        free: NDArray[np.float64],
        allowed: NDArray[np.bool_],
        of: NDArray[np.intp],
    ) -> NDArray[np.float64]:
        """Return what each candidate gains, higher being better.

        cpus, memory_bytes, free, allowed: as `Mix.stranded` takes them, first n nodes as they are, then the candidates, each a
        node after the lease; of: (candidates,), the node of each.
        """
        import numpy as np

        count = len(cpus) - len(of)
        if self.name == "firstfit":
            return np.zeros(len(of))
        if self.name == "bestfit":
            left: NDArray[np.float64] = (free[count:].sum(axis=1) * 1e5 + cpus[count:]) / MICRO + memory_bytes[count:] / 2.0**50
            return -left
        stranded = mix.stranded(cpus, memory_bytes, free, allowed)
        gained: NDArray[np.float64] = stranded[:count][of] - stranded[count:]
        return np.floor(100 / (1 + np.exp(-gained / MICRO**2))) if self.name == "fgd" else gained


def _published_mix(counts: Mapping[Shape, float]) -> Mix:
    from .mix import Mix

    asked: dict[Shape, float] = {}
    for shape, count in counts.items():
        plain = Shape(shape.cpus, 0, shape.gpus, models=shape.models if shape.gpus else ())
        asked[plain] = asked.get(plain, 0.0) + count

    def order(shape: Shape) -> tuple[object, ...]:
        return (asked[shape], micro(shape.cpus), micro(min(1.0, shape.gpus)), shape.gpus, shape.models)

    typical: dict[Shape, float] = {}
    for shape in sorted(asked, key=order, reverse=True):
        if sum(typical.values()) >= COVERED * sum(asked.values()):
            break
        typical[shape] = asked[shape]
    useless = sum(count for shape, count in typical.items() if not shape.gpus)
    return Mix(typical, power=0.0, useless=useless, max_shapes=max(1, len(typical)))


TENURE = Rule("tenure", "where it strands least of the GPUs; small requests count for more", step=STEP)
RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        TENURE,
        Rule("fgd", "where fragmentation grows least, as published (USENIX ATC'23)"),
        Rule("bestfit", "where the least GPU is left, then the fewest CPUs, then the least memory", about_gpus=False),
        Rule("firstfit", "the first node by name that has room", about_gpus=False),
    )
}
"""By name."""


def rule_named(name: str) -> Rule:
    """Return a rule. Raises SpecError that lists them."""
    if name not in RULES:
        raise SpecError(f"no placement is called {name!r}; there are {', '.join(RULES)}")
    return RULES[name]
