"""How surely two ways to serve a model can be told apart: the standard error of a paired ratio over 20 interleaved repeats.

World: `tenure bench serve` on this machine, real leases that go before all else on it (`--undisturbed`): MobileNetV2
(`vision/models`, ONNX, its batch made free of size), 64 images of `vision/images` decoded beforehand (from memory: what a
disk does is not asked here); simple, microservice and distributed (over loopback where no namespace can be made), sync and
async, every transport, batch 1; 20 repeats, each of three visits of at least 0.4 s to every setting, the order drawn anew for
every visit (--quick: sync, http and grpc, 6 repeats of three visits of 0.1 s); half a core is leased to the client's node, so
that no node is paused by its own bound.
Ratio: images/s of a setting ÷ images/s of `simple sync` with the same batch in the same repeat. Standard error: sample
standard deviation of the 20 ratios ÷ square root of 20, relative to their mean; no repeat is left out.
Machine: the reference is run twice in every repeat, each at a random place (`twin`); the standard error of that ratio is what
this machine does to a ratio whose truth is 1, and stands beside every figure. Cores that others kept busy stand there too.
Bars, both must hold: the relative standard error of every setting <= 0.5 % on one node and <= 3.5 % for the distributed ones
(of 6 repeats, with --quick: both x square root of 20/6). The median over settings stands in the details.
Reference: study 3 reports 0.5 % on one node, 3.5 to 35 % distributed, unpaired, over 20 repeats one after the other.
Control: the same rates with a drift planted on them (each multiplied by what a machine that slows down by 30 % over the run
would have left of it, by the cell's place in the order), the ratio taken without pairing: mean ÷ mean, errors added as if
independent. It must miss 0.5 % in every setting; the paired ratio of the same drifted rates must hold 0.5 % on one node.
Left out: whether the intervals cover the truth (interval_coverage), open load, several clients.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.harness import Control, Options, Result, judge
from benchmarks.serving_experiment import experiment
from tenure.experiments.sweep_run import measure_sweep
from tenure.recommend.tune import quiet
from tenure.sweeps import Sweep
from tenure.trials import Trial

NAME = "standard_error"
BAR = "standard error of the paired ratio over 20 repeats <= 0.5 % on one node, <= 3.5 % distributed"
REPEATS = 20
NEAR_BAR, FAR_BAR = 0.005, 0.035
SLOWDOWN = 0.3
"""What the planted drift takes off the rate by the end of the run."""


def run(options: Options) -> Result:
    """Measure; see the module's docstring."""
    full = Sweep(
        batches=(1,),
        data=("memory",),
        repeats=REPEATS,
        cell_s=0.4,
        visits=3,
        client_cpus=0.5,
        fresh=False,
        undisturbed=True,
        normalise="signed",
    )
    quick = replace(full, interactions=("sync",), transports=("http", "grpc"), repeats=6, cell_s=0.1)
    sweep = quick if options.quick else full
    with experiment(options, sweep) as made:
        trials = measure_sweep(
            made.bench,
            sweep,
            made.settings,
            seed=options.seed,
            make_trial=lambda **fields: made.context.trial(stage=made.job.name, fingerprint="", **fields),
            record=lambda trial: None,
            progress=quiet,
        )
    allowance = math.sqrt(REPEATS / sweep.repeats)
    references = {trial.configuration["batch"]: trial for trial in trials if _is_reference(trial)}
    errors = {_name(trial): _paired_error(trial, references[trial.configuration["batch"]]) for trial in _compared(trials)}
    twins = {_name(trial): _paired_error(trial, references[trial.configuration["batch"]]) for trial in trials if _twin(trial)}
    near = {_name(t): errors[_name(t)] for t in _compared(trials) if t.configuration["architecture"] != "distributed"}
    far = {name: error for name, error in errors.items() if name not in near}
    drifted = [_drifted(trial, len(made.settings) * sweep.repeats * sweep.visits) for trial in trials]
    control, drifted_error = _control(drifted, allowance)
    details = {
        "settings": len(errors),
        "repeats": sweep.repeats,
        "worst_near": max(near.values()),
        "worst_near_setting": max(near, key=lambda name: near[name]),
        "worst_far": max(far.values()),
        "median_near": statistics.median(near.values()),
        "median_far": statistics.median(far.values()),
        "machine_repeat_error": twins,
        "errors": errors,
        "other_cpu_cores": statistics.fmean(trial.metrics["other_cpu_cores"].mean for trial in trials),
        "unpaired_error_median": statistics.median(
            _unpaired_error(trial, references[trial.configuration["batch"]]) for trial in _compared(trials)
        ),
        "drifted_worst_paired_error": drifted_error,
    }
    value = max(near.values())
    near_bar, far_bar = NEAR_BAR * allowance, FAR_BAR * allowance
    holds, why = judge(value <= near_bar and max(far.values()) <= far_bar and drifted_error <= near_bar, control)
    reference = {"study 3, on one node": 0.005, "study 3, distributed": [0.035, 0.35]}
    return Result(
        value=value,
        spread=None,
        unit="relative standard error",
        holds=holds,
        why=why,
        reference=reference,
        control=control,
        details=details,
    )


def _control(drifted: Sequence[Trial], allowance: float) -> tuple[Control, float]:
    """Return the control, and the worst paired error of the drifted rates on one node."""
    references = {trial.configuration["batch"]: trial for trial in drifted if _is_reference(trial)}
    pairs = [(trial, references[trial.configuration["batch"]]) for trial in _compared(drifted)]
    unpaired = min(_unpaired_error(*pair) for pair in pairs)
    paired = max(_paired_error(*pair) for pair in pairs if pair[0].configuration["architecture"] != "distributed")
    control = Control(
        name="unpaired, on a machine that slows down by 30 %",
        value=unpaired,
        failed=unpaired > NEAR_BAR * allowance,
        how=f"an error of {unpaired:.2%} at least, where the paired ratio of the same rates has {paired:.2%} at most",
    )
    return control, paired


def _is_reference(trial: Trial) -> bool:
    factors = trial.configuration
    return factors["architecture"] == "simple" and factors["interaction"] == "sync" and not _twin(trial)


def _twin(trial: Trial) -> bool:
    return bool(trial.configuration.get("twin"))


def _compared(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if not _is_reference(trial) and not _twin(trial)]


def _name(trial: Trial) -> str:
    factors = trial.configuration
    words = [factors[name] for name in ("architecture", "transport", "interaction") if factors[name] != "none"]
    return f"{' '.join(map(str, words))} batch {factors['batch']}"


def _paired_error(trial: Trial, reference: Trial) -> float:
    """Return the standard error of the mean of the ratios by repeat, relative to that mean."""
    rates = zip(trial.curves["images_per_s"], reference.curves["images_per_s"], strict=True)
    ratios = [one / other for one, other in rates]
    return statistics.stdev(ratios) / math.sqrt(len(ratios)) / statistics.fmean(ratios)


def _unpaired_error(trial: Trial, reference: Trial) -> float:
    """Return the relative standard error of mean ÷ mean, both taken as independent."""
    parts = []
    for one in (trial, reference):
        rates = one.curves["images_per_s"]
        parts.append(statistics.stdev(rates) / math.sqrt(len(rates)) / statistics.fmean(rates))
    return math.hypot(*parts)


def _drifted(trial: Trial, cells: int) -> Trial:
    """Return the trial as a machine would have given it that slows down over the run."""
    rates = tuple(
        rate * (1 - SLOWDOWN * place / cells)
        for rate, place in zip(trial.curves["images_per_s"], trial.curves["order"], strict=True)
    )
    return replace(trial, curves={**trial.curves, "images_per_s": rates})
