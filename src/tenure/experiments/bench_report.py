"""The section of a report on a serving experiment: the goal's answer, the bottleneck with its proof, the study's table 2.

    sweep trials ──► decide.goal_answer, decide.bottleneck ──► blocks, each cell citing its trial ──► report

What a page shows first is what a reader acts on. Settings measured under open load have a table of their own: their rate was
given. Figures are made in `bench_figures`, the tables of all settings in `bench_tables`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from tenure.codec import to_builtins
from tenure.decide.bottleneck import Bottleneck, find_bottlenecks, is_closed, is_twin, repeat_error
from tenure.decide.goal_answer import Answer, answer, percentile_at_most
from tenure.decide.repeats import Paired, errors, in_words, paired_with_first
from tenure.decide.stations import OURS
from tenure.experiments.bench_figures import bench_figures, in_order, setting
from tenure.experiments.bench_tables import asked_again, bottleneck_table, forecast_table, open_table, setting_tables, table_two
from tenure.experiments.machine_load import DISTURBED_CORES
from tenure.experiments.report_cite import Cell, Rows, make_table, show, text_cell, words
from tenure.jobs import ServeGoal
from tenure.runs import Stage
from tenure.trials import Trial

Block = dict[str, Any]
_SENTENCES = re.compile(r"(?<=\.) ")
_HIGHEST = ServeGoal(name="the highest rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What the trials of one stage say together."""

    trials: Mapping[str, Trial]
    """Closed load, without twins, by id."""
    opened: tuple[Trial, ...]
    goals: tuple[ServeGoal, ...]
    answers: tuple[Answer, ...]
    bottlenecks: Mapping[str, Bottleneck]
    """By trial."""
    pairs: tuple[Paired, ...]
    """Settings held against the first of their batch."""

    @property
    def best(self) -> Trial | None:
        """The first goal's answer, or what comes nearest to it."""
        first = self.answers[0]
        return self.trials.get(first.best or first.nearest or "")


def find_experiment(rows: Rows, stage: Stage) -> Experiment | None:
    """Return what the sweep trials of a stage say; None when it has none."""
    swept = sorted((trial for trial in rows.of_stage(stage)[0] if trial.source == "sweep"), key=lambda trial: trial.at_s)
    # An experiment that was broken off and resumed has measured settings twice: the last time counts.
    found = list({tuple(sorted(trial.configuration.items())): trial for trial in swept}.values())
    if not found:
        return None
    job = rows.data.jobs.get(stage.name)
    goals = (job.serve_goals if job is not None else ()) or (_HIGHEST,)
    near, far = (_leased_cores(rows, stage, part) for part in ("server", "client"))
    apart = _server_cores(rows, stage)
    return Experiment(
        trials={trial.id: trial for trial in in_order(found) if is_closed(trial) and not is_twin(trial)},
        opened=tuple(trial for trial in found if trial.configuration.get("load", "closed") != "closed"),
        goals=goals,
        answers=tuple(answer(goal, found) for goal in goals),
        pairs=paired_with_first(found),
        bottlenecks={
            one.trial: one for one in find_bottlenecks(found, near_cores=near + apart, far_cores=far, server_cores=apart)
        },
    )


def bench_blocks(rows: Rows, stage: Stage) -> list[Block]:
    """Return the blocks of a stage's experiment; none when it has no sweep trials."""
    experiment = find_experiment(rows, stage)
    if experiment is None:
        return []
    trials = list(experiment.trials.values())
    blocks = _disturbed(experiment)
    for goal, found in zip(experiment.goals, experiment.answers, strict=True):
        blocks += _answered(rows, experiment, goal, found)
    blocks += _bounded(rows, experiment)
    drawn = [{"kind": "figure", "figure": figure} for figure in bench_figures(rows, stage, trials, experiment.best)]
    blocks += [{"kind": "heading", "text": "Rate"}, *drawn[:2]] if drawn else []
    blocks += asked_again(rows, trials)
    blocks += table_two(rows, trials, experiment.best)
    blocks += [{"kind": "heading", "text": "Where the time, the cores and the memory go"}, *drawn[2:]] if drawn[2:] else []
    blocks += _heading("What bounds each setting", bottleneck_table(rows, trials, experiment.bottlenecks))
    blocks += _heading("The link: foretold, and measured", forecast_table(rows, trials))
    blocks += _heading("Open load: the rate is given, latency is the answer", open_table(rows, experiment.opened))
    blocks += _heading("All settings", setting_tables(rows, trials, experiment.pairs))
    return blocks + _how_measured(rows, stage, experiment)


def bench_data(rows: Rows, stage: Stage) -> dict[str, Any]:
    """Return what an experiment says as plain data, for programs: answers, bottlenecks, repeat error; empty without one."""
    experiment = find_experiment(rows, stage)
    if experiment is None:
        return {}
    trials = [trial for trial in rows.of_stage(stage)[0] if trial.source == "sweep"]
    plain: dict[str, Any] = to_builtins(
        {
            "answers": [
                {"goal": goal, **asdict(found)} for goal, found in zip(experiment.goals, experiment.answers, strict=True)
            ],
            "bottlenecks": list(experiment.bottlenecks.values()),
            "repeat_error": repeat_error(trials),
            "paired": list(experiment.pairs),
            "standard_errors": errors(experiment.pairs),
        }
    )
    return plain


def bench_cards(rows: Rows, stage: Stage) -> list[dict[str, Any]]:
    """Return the few figures of an experiment that a reader wants first."""
    experiment = find_experiment(rows, stage)
    if experiment is None or experiment.best is None:
        return []
    best, first = experiment.best, experiment.answers[0]
    goal = experiment.goals[0].name
    title = f"best for {goal}" if first.best else f"nearest to {goal}, which nothing meets"
    cell = rows.trial(best, "images_per_s")
    cards = [
        {"name": title, "text": setting(best.configuration), "cite": {}},
        {"name": "images per second there", "text": cell["text"], "value": cell["value"], "cite": cell["cite"]},
    ]
    if "p99_s" in best.metrics:
        cell = rows.trial(best, "p99_s")
        cards.append({"name": "p99 latency there", "text": cell["text"], "value": cell["value"], "cite": cell["cite"]})
    if (bound := experiment.bottlenecks.get(best.id)) is not None:
        cards.append({"name": "what bounds it", "text": bound_words(bound), "cite": {}})
    return cards


def bound_words(found: Bottleneck) -> str:
    """Return what bounds a setting in a few words."""
    if found.where in _BOUND_WORDS:
        text = _BOUND_WORDS[found.where]
        return f"{text}: {_FILLERS.get(found.party, found.party)}" if found.party and found.where != "others" else text
    return f"waiting: {words(f'{found.where}_s')}"


_BOUND_WORDS = {
    "gpu": "the GPU",
    "link": "the link's rate",
    "node": "all cores",
    "server_node": "all cores of the server's node",
    "client_node": "all cores of the client's node",
    "others": "others on the machine",
    "app": "the application's thread",
    "client": "the client's thread",
    "server": "the server's own thread",
    "recogniser": "the model's thread",
    "forwarder": "the emulated link itself",
    "delay": "waiting: the link's delay",
    "queue": "waiting: the server's queue",
}
_FILLERS = {
    "model": "the model",
    "app": "the application",
    "client": "the client part",
    "server": "the server",
    "other": "that server",
}


def _answered(rows: Rows, experiment: Experiment, goal: ServeGoal, found: Answer) -> list[Block]:
    """Return the answer to one goal: a sentence, and how the best of each architecture stands."""
    blocks: list[Block] = [{"kind": "heading", "text": f"Answer for: {_goal_words(goal)}"}]
    if found.best is None:
        nearest = experiment.trials.get(found.nearest or "")
        text = "Nothing that was measured meets the goal."
        if nearest is not None:
            standing = next(one for one in found.standings if one.trial == nearest.id)
            misses = ", ".join(
                f"{words(miss.metric)} {'not measured' if miss.found is None else show(miss.metric, miss.found)} where "
                f"{show(miss.metric, miss.bound)} is asked"
                for miss in standing.misses
            )
            text += f" Nearest is {setting(nearest.configuration)}: {misses}."
        blocks.append({"kind": "warning", "text": text})
    else:
        best = experiment.trials[found.best]
        blocks.append({"kind": "chosen", "text": f"{setting(best.configuration)}: {_rate(best)}"})
        if not found.sure:
            why = "what was found meets it, but there were too few requests, or they scatter too much, to be sure (95 %)"
            blocks.append({"kind": "warning", "text": f"It meets the goal barely: {why}."})
        if found.ties:
            names = ", ".join(setting(experiment.trials[tie].configuration) for tie in found.ties[:4])
            more = f" and {len(found.ties) - 4} more" if len(found.ties) > 4 else ""
            text = f"Not surely slower, as far as this machine repeats itself: {names}{more}."
            if found.thriftiest not in (None, found.best):
                thrifty = setting(experiment.trials[str(found.thriftiest)].configuration)
                text += f" Of these {thrifty} takes the least CPU per image."
            blocks.append({"kind": "text", "text": text})
    return blocks + _standings(rows, experiment, found)


def _standings(rows: Rows, experiment: Experiment, found: Answer) -> list[Block]:
    """Return the best of each architecture and contender, with how it stands to the goal."""
    meets = {one.trial: one.meets for one in found.standings}
    level = {"surely": 2, "barely": 1, "no": 0}
    best: dict[tuple[object, object], Trial] = {}
    for trial in (experiment.trials[one.trial] for one in found.standings):
        place = (trial.configuration.get("architecture"), trial.configuration.get("server"))
        held = best.get(place)
        if held is None or (level[meets[trial.id]], _mean(trial)) > (level[meets[held.id]], _mean(held)):
            best[place] = trial
    against = experiment.trials.get(found.best or "")
    table: list[list[Cell]] = []
    for trial in in_order(best.values()):
        upper = percentile_at_most(trial, 99.0)
        ratio = rows.ratio(trial, against) if against is not None and trial is not against else text_cell("–")
        table.append(
            [
                text_cell(setting(trial.configuration)),
                rows.trial(trial, "images_per_s"),
                ratio,
                rows.trial(trial, "p99_s") if "p99_s" in trial.metrics else text_cell("–"),
                text_cell("–" if upper is None else "too few requests" if upper == float("inf") else show("p99_s", upper)),
                text_cell(meets[trial.id]),
                text_cell(bound_words(bound) if (bound := experiment.bottlenecks.get(trial.id)) else "–"),
            ]
        )
    columns = ["best setting of each", "rate", "÷ the answer's", "p99", "p99 at most (95 %)", "meets it", "bounded by"]
    return [make_table("Each architecture at its best for this goal", columns, table)] if table else []


def _bounded(rows: Rows, experiment: Experiment) -> list[Block]:
    """Return what bounds the best setting: the sentence, the rows that prove it, what to change."""
    best = experiment.best
    found = experiment.bottlenecks.get(best.id) if best is not None else None
    if best is None or found is None:
        return []
    blocks: list[Block] = [
        {"kind": "heading", "text": f"The bottleneck of {setting(best.configuration)}: {bound_words(found)}"},
        {"kind": "text", "text": found.why},
        {"kind": "chosen", "text": f"What to change: {found.change}"},
    ]
    if won := to_be_won(experiment, found):
        blocks.append({"kind": "text", "text": won})
    proof = []
    for row in found.rows:
        trial = experiment.trials[row.trial]
        cell = rows.factor(trial, "link") if row.metric == "link" else rows.trial(trial, row.metric)
        proof.append([text_cell(words(row.metric)), cell, text_cell(row.trial)])
    blocks.append(make_table("The rows that prove it", ["measured", "value", "trial"], proof))
    return blocks


def to_be_won(experiment: Experiment, found: Bottleneck) -> str:
    """Return in a sentence or two how much a change is worth: measured, and at most."""
    parts = []
    if found.gain is not None:
        ratio, meets = found.gain.ratio, {one.trial: one.meets for one in experiment.answers[0].standings}
        but = ", which then misses the goal" if meets.get(found.gain.trial) == "no" else ""
        beforehand = found.gain.change == "data memory"  # what files cost, rather than a change that can be had
        change = "pictures decoded beforehand" if beforehand else found.gain.change
        parts.append(
            f"Measured: with {change} the rate is {ratio.value:.2f} times as high "
            f"({ratio.low:.2f} to {ratio.high:.2f}; trial {found.gain.trial}){but}."
        )
    most = found.at_most
    if most is None and found.where != "others":
        parts.append("How much there is to win by it cannot be told from what was metered.")
    elif most is not None and most < 1.05:
        parts.append("By that alone, at this batch, next to nothing is to be won: something else is as full already.")
    elif most is not None and found.party:
        parts.append(
            f"Were the model alone left on these cores, the rate at this batch would be {most:.2f} times as high and no higher."
        )
    elif most is not None:
        parts.append(f"By that alone the rate at this batch can grow to {most:.2f} times at most: then something else is full.")
    if most is not None and found.gain is not None and found.gain.ratio.low > most:
        larger = found.gain.change.startswith("batch ")
        parts.append(
            "What was measured is beyond that: a larger batch costs the model itself less per image."
            if larger
            else f"What was measured is beyond that: with {found.gain.change} more changes than what is full here."
        )
    return " ".join(parts)


def bench_outcome(rows: Rows, stage: Stage) -> str:
    """Return what came of an experiment in one sentence; empty without one."""
    experiment = find_experiment(rows, stage)
    if experiment is None or experiment.best is None:
        return ""
    best, goal = experiment.best, _goal_words(experiment.goals[0])
    bound = experiment.bottlenecks.get(best.id)
    because = f"; what bounds it: {bound_words(bound)}" if bound is not None else ""
    if experiment.answers[0].best is None:
        return f"Of {len(experiment.trials)} settings none meets {goal}; {setting(best.configuration)} comes nearest{because}."
    ties = len(experiment.answers[0].ties)
    alike = f", {ties} other{'s are' if ties > 1 else ' is'} not surely slower" if ties else ""
    name, count = setting(best.configuration), len(experiment.trials)
    return f"Of {count} settings {name} answers {goal} best: {_rate(best)}{alike}{because}."


def _how_measured(rows: Rows, stage: Stage, experiment: Experiment) -> list[Block]:
    trials = [trial for trial in rows.of_stage(stage)[0] if trial.source == "sweep"]
    repeats = sorted({trial.metrics["images_per_s"].n for trial in trials if "images_per_s" in trial.metrics})
    many = f"{repeats[0]}" if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}" if repeats else "no"
    text = (
        f"{len(experiment.trials)} settings, {many} repeats each. Every repeat ran all settings in a random order of its own, "
        "so ratios are taken repeat by repeat (decide.intervals); closed and open load are never in one column."
    )
    blocks: list[Block] = [{"kind": "heading", "text": "How this was measured"}, {"kind": "text", "text": text}]
    twins = [trial for trial in trials if is_twin(trial)]
    if (error := repeat_error(trials)) is not None:
        what = f"{len(twins)} settings were" if len(twins) > 1 else "one setting was"
        text = (
            f"The machine's own repeat error: {what} measured twice in every repeat, and the second came out {error.value:.4g} "
            f"times as fast as the first (95 %: {error.low:.4g} to {error.high:.4g}; the farthest from 1, which is the "
            "truth). A ratio is called a difference here when its whole interval lies beyond that."
        )
        blocks.append({"kind": "text", "text": text})
    else:
        blocks.append({"kind": "small", "text": "No setting was measured twice: the machine's own repeat error is not known."})
    if (sure := errors(experiment.pairs)) is not None:
        sentence = in_words(sure)
        blocks.append({"kind": "text", "text": f"{sentence[0].upper()}{sentence[1:]}. All are of {many} repeats."})
    others = sorted({name for trial in trials if (name := str(trial.configuration.get("server", OURS))) != OURS})
    if others:
        near = _leased_cores(rows, stage, "server")
        ours = f"; ours had {near:g} cores by its lease" if near else ""
        text = f"{', '.join(others)} ran already, under no lease of ours, on all cores of where it is{ours}."
        blocks.append({"kind": "text", "text": text})
    told = Counter(part for trial in trials for part in _SENTENCES.split(trial.note) if part and not part.startswith("Others "))
    return blocks + [
        {"kind": "small", "text": f"{note} ({count} of {len(trials)} settings)"} for note, count in told.most_common(10)
    ]


def _disturbed(experiment: Experiment) -> list[Block]:
    """Return a warning when others used the machine meanwhile."""
    cores = [
        summary.mean
        for trial in experiment.trials.values()
        if (summary := trial.metrics.get("other_cpu_cores")) is not None and summary.mean > DISTURBED_CORES
    ]
    if not cores:
        return []
    text = (
        f"Others kept {min(cores):.1f} to {max(cores):.1f} cores of this machine busy while {len(cores)} of "
        f"{len(experiment.trials)} settings were measured. Ratios hold, as all settings met it alike; rates are lower."
    )
    return [{"kind": "warning", "text": text}]


def _leased_cores(rows: Rows, stage: Stage, part: str) -> float:
    """Return the cores of one node's lease; 0 where the leases do not tell."""
    for lease in rows.of_stage(stage)[2]:
        if lease.command.argv and PurePath(lease.command.argv[-1]).name == f"{part}-node.json":
            return lease.envelope.cpus
    return 0.0


def _server_cores(rows: Rows, stage: Stage) -> float:
    """Return the cores of a server that has a lease of its own, beside its node's; 0 where they share one."""
    leases = [lease for lease in rows.of_stage(stage)[2] if "tenure.serve" in lease.command.argv]
    return leases[0].envelope.cpus if leases else 0.0


def _goal_words(goal: ServeGoal) -> str:
    return goal.name + (f" ({goal.clients} clients)" if goal.clients > 1 else "")


def _rate(trial: Trial) -> str:
    return f"{show('images_per_s', _mean(trial)).removesuffix('/s')} images/s"


def _mean(trial: Trial) -> float:
    return trial.metrics["images_per_s"].mean


def _heading(text: str, blocks: Sequence[Block]) -> list[Block]:
    return [{"kind": "heading", "text": text}, *blocks] if blocks else []
