"""Serving as a search: many settings, for each goal a few of them measured, the choice told with its confidence.

    settings ──► which next? ──► probe: start it so, load it ──► trial ──► certain, or all spent?
                     ▲                                                │ no           │ yes
                     └────────────────────────────────────────────────┘              └──► the choice, and what others lack

What is plausible of a setting is `decide.serve_search`'s affair; here goals become aims, and outlooks a recommendation. Not
here: starting servers (`experiments.stage_search`), goals whose settings are all measured (`serving`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tenure.decide.serve_laws import FACTORS, Floats
from tenure.decide.serve_posterior import Metrics
from tenure.decide.serve_search import Advice, Aim, Outlook, advise, outlook
from tenure.errors import JobFailed, SpecError
from tenure.jobs import Job, ServeGoal
from tenure.prices import PriceVector
from tenure.resources import Capacity
from tenure.sweeps import Search
from tenure.trials import Broken, Candidate, Configuration, Prediction, Recommendation, Trial

from .probing import Leases, aim, comparable
from .search_words import PER_IMAGE, against, candidate, goal_words, predictions, thin, why, words
from .serving import ServeModel, describe_goal

MAX_SETTINGS = 1000
"""Searched at once: past it a step of thought takes longer than a trial."""
MAX_TOLD = 40
"""Settings that were not measured and are told of one by one, the most promising."""
MAX_FAILURES = 3
"""Settings that may fail, before one was measured, until the stage fails with the last of them."""
_ANY = ServeGoal(name="the most images/s")


def space(search: Search, *, cores: float, clients: int = 1, fixed_batch: int = 0) -> tuple[Configuration, ...]:
    """Return the settings that are searched for so many clients.

    Left out is what cannot be better: more threads at a time than cores, and with a single request under way a second
    instance or a delay. fixed_batch: the only one that the model takes, 0 for any. Raises SpecError for none, or too many.
    """
    powers = tuple(2**n for n in range(10) if 2**n <= max(1.0, cores))
    batches = [batch for batch in search.batches if fixed_batch in (0, batch)]
    if not batches:
        raise SpecError(f"the model takes {fixed_batch} at a time, and search.batches is {list(search.batches)}")
    places = [("simple", "none", "in-process")] if "simple" in search.architectures else []
    if "microservice" in search.architectures:
        places += [("microservice", transport, "loopback") for transport in search.transports]
    found: list[Configuration] = []
    for (architecture, transport, link), interaction, batch in itertools.product(places, search.interactions, batches):
        simple, single = architecture == "simple", interaction == "sync" and (clients == 1 or architecture == "simple")
        instances = search.instances or powers
        instances = (min(instances),) if single else instances
        delays_s = (0.0,) if simple else (min(search.max_delays_s),) if single else search.max_delays_s
        room = max(1.0, cores / clients) if simple else max(1.0, cores)
        for count, threads, delay_s in itertools.product(instances, search.threads or powers, delays_s):
            if count * threads <= room:
                place = {"architecture": architecture, "transport": transport, "link": link, "interaction": interaction}
                found.append({**place, "batch": batch, "instances": count, "threads": threads, "max_delay_s": delay_s})
    if not found:
        raise SpecError(
            f"no setting is left to search: instances x threads must stay within {cores:g} cores"
            f"{f' shared by {clients} applications' if clients > 1 else ''}; lower search.instances or search.threads"
        )
    if len(found) > MAX_SETTINGS:
        raise SpecError(
            f"{len(found)} settings are too many to search, at most {MAX_SETTINGS}: name fewer batches, instances, threads, "
            "transports or max_delays in [serve.search]"
        )
    return tuple(found)


class SearchTunable:
    """One model and its goals, searched. Implements `protocols.Tunable`; a configuration names `clients` too."""

    def __init__(
        self,
        job: Job,
        capacity: Capacity,
        prices: PriceVector,
        fingerprint: str,
        probe: Callable[[Configuration], Iterator[Trial]],
        *,
        fixed_batch: int = 0,
        told: Callable[[str], None] = lambda text: None,
    ) -> None:
        """job: a serve stage with `search`. capacity: of the node. probe: measures one configuration; that it can't raises
        JobFailed. told: hears of settings that can't be measured. Raises SpecError as `space` does."""
        if job.search is None:
            raise SpecError(f"stage {job.name!r} has no [serve.search]; there is nothing to search")
        self.job, self.capacity, self.prices, self.fingerprint = job, capacity, prices, fingerprint
        self.search, self.goals = job.search, job.serve_goals or (_ANY,)
        self.failed: dict[tuple[object, ...], str] = {}
        """Why settings could not be measured."""
        self._probe, self._told, self._measured = probe, told, False
        self._spaces: dict[int, list[Configuration]] = {
            clients: [
                {**setting, "clients": clients}
                for setting in space(job.search, cores=capacity.cpus, clients=clients, fixed_batch=fixed_batch)
            ]
            for clients in dict.fromkeys(goal.clients for goal in self.goals)
        }

    @property
    def max_probes(self) -> int:
        """How many probes all goals together may need, those that fail included."""
        return (self.search.trials + MAX_FAILURES) * len(self.goals)

    def configurations(self) -> Sequence[Configuration]:
        """Return the settings of all goals, with their clients."""
        return [setting for settings in self._spaces.values() for setting in settings]

    def next_probe(self, trials: Sequence[Trial]) -> Configuration | None:
        """Return what to measure for the first goal that is not yet answered with confidence; None when all are.

        Where the first settings failed, the one that needs least is next: if that fails, too, it is hardly the setting's fault.
        """
        if self.failed and not self._measured and not self._usable(trials):
            return min(self._settings(self.goals[0]), key=_needs)
        return next((asked for goal in self.goals if (asked := self.advice(goal, trials).next) is not None), None)

    def advice(self, goal: ServeGoal, trials: Sequence[Trial]) -> Advice:
        """Return what follows from the trials for one goal."""
        settings = self._settings(goal)
        wanted, _ = self._aim(goal, settings)
        shared = [one for one in self.goals[: self.goals.index(goal)] if one.clients == goal.clients]
        most = self.search.trials * (1 + len(shared))  # trials with these clients, for the goals before, too
        return advise(settings, self._usable(trials), wanted, cores=self.capacity.cpus, max_trials=most)

    def probe(self, configuration: Configuration) -> Iterator[Trial]:
        """Measure by the callable handed in; a setting that can't be measured is left out from then on, and yields nothing.

        Raises JobFailed when nothing but failures came of the first settings.
        """
        try:
            yield from self._probe(configuration)
            self._measured = True
        except JobFailed as error:
            self.failed[key(configuration)] = str(error)
            self._told(f"{words(configuration)} could not be measured and is left out: {str(error).splitlines()[0]}")
            if not self._measured and len(self.failed) >= MAX_FAILURES:
                raise

    def predict(self, configuration: Configuration, trials: Sequence[Trial]) -> dict[str, Prediction]:
        """Return what is plausible of one configuration. Raises SpecError for one that isn't searched."""
        clients = int(configuration.get("clients", 1))
        for found in self._outlooks(replace(_ANY, clients=clients), trials, None) if clients in self._spaces else ():
            if key(found.configuration) == key(configuration):
                return predictions(found)
        raise SpecError(f"{words(configuration)} is not among the settings that are searched")

    def recommend(
        self, goal: ServeGoal, trials: Sequence[Trial], *, id: str, run_id: str, stage: str, now_s: float
    ) -> Recommendation:
        """Return the choice for one goal with its confidence, and what stands against each other setting.

        Predictions are 90 % intervals of what is plausible after all trials; those of settings that were not measured say so.
        """
        usable, advice = self._usable(trials), self.advice(goal, trials)
        outlooks = self._outlooks(goal, trials, advice.choice)
        chosen = next((one for one in outlooks if advice.choice is not None and one.configuration == advice.choice), None)
        others = [one for one in outlooks if one is not chosen]
        unmeasured = sorted((one for one in others if not one.trials), key=lambda one: (-one.better, -one.meets, -_rate(one)))
        aimed = self._aimed(goal)
        told = [*(one for one in others if one.trials), *unmeasured[:MAX_TOLD]]
        ruled_out = [candidate(one, [against(one, chosen, goal, aimed=aimed)]) for one in told]
        ruled_out += [
            Candidate(
                configuration=setting,
                broken=(Broken(constraint="measuring", limit=0.0, found=0.0, reason=f"it could not be measured: {reason}"),),
            )
            for setting in self._spaces[goal.clients]
            if (reason := self.failed.get(key(setting)))
        ]
        searched = {key(setting) for setting in self._spaces[goal.clients]}
        mine = tuple(t.id for t in usable if key(t.configuration) in searched)
        left = len(unmeasured) - MAX_TOLD
        return Recommendation(
            id=id,
            run_id=run_id,
            stage=stage,
            goal=goal_words(describe_goal(goal), goal, by_cost=aimed != "images_per_s"),
            chosen=None if chosen is None else self._chosen(chosen, goal, usable),
            ruled_out=tuple(ruled_out),
            trials=mine,
            why=why(chosen, outlooks, advice, goal, aimed=aimed, count=len(searched), left=left),
            thin=thin(advice, found=chosen is not None, spent=len(mine) >= self.search.trials),
            at_s=now_s,
        )

    def _chosen(self, chosen: Outlook, goal: ServeGoal, trials: Sequence[Trial]) -> Candidate:
        """Return the choice with the leases that it needs."""
        found = candidate(chosen, ())
        same = [t for t in trials if key(t.configuration) == key(chosen.configuration)]
        model = ServeModel(same, goal, self.capacity, self.prices)
        if not model.trials:  # its memory was not metered: it can be told, but not leased
            return found
        ((leases, envelope), *_) = model.parts(chosen.configuration, goal.images_per_s or _rate(chosen))
        return replace(found, envelope=envelope, leases=leases)

    def _outlooks(self, goal: ServeGoal, trials: Sequence[Trial], choice: Configuration | None) -> tuple[Outlook, ...]:
        settings = self._settings(goal)
        wanted, leases = self._aim(goal, settings)
        more: dict[str, Callable[[Metrics], Floats]] = {"cost_usd": leases.usd_per_hour}
        if self._aimed(goal) == PER_IMAGE:
            more[PER_IMAGE] = lambda metrics: leases.usd_per_image(metrics) * 1e6
        return outlook(settings, self._usable(trials), wanted, choice=choice, cores=self.capacity.cpus, more=more)

    def _aim(self, goal: ServeGoal, settings: Sequence[Configuration]) -> tuple[Aim, Leases]:
        leases = Leases(settings, goal, self.prices, self.capacity)
        return aim(goal, None if self._aimed(goal) == "images_per_s" else leases.usd_per_image), leases

    def _aimed(self, goal: ServeGoal) -> str:
        """Return the metric that is best among settings that meet the goal."""
        if self.search.best == "rate" or not (self.search.best or goal.images_per_s):
            return "images_per_s"
        return "cost_usd" if goal.images_per_s else PER_IMAGE

    def _settings(self, goal: ServeGoal) -> list[Configuration]:
        settings = [setting for setting in self._spaces[goal.clients] if key(setting) not in self.failed]
        if not settings:
            raise JobFailed(f"stage {self.job.name}: none of the settings could be measured: {[*self.failed.values()][-1]}")
        return settings

    def _usable(self, trials: Sequence[Trial]) -> list[Trial]:
        return comparable([t for t in trials if t.fingerprint == self.fingerprint])


def key(configuration: Configuration) -> tuple[object, ...]:
    """Return what tells two settings apart."""
    return tuple(configuration.get(factor) for factor in FACTORS)


def _needs(configuration: Configuration) -> tuple[float, ...]:
    return tuple(float(configuration[name]) for name in ("instances", "threads", "batch"))


def _rate(one: Outlook) -> float:
    return one.metrics["images_per_s"][1]
