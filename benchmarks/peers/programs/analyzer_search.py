"""Model Analyzer's own searches, told somebody else's measurements. Run by the interpreter of its home.

One JSON line in, one out. `{"new": "quick" | "optuna", "sizes": [levels of each dimension], "seed": n}` begins a search,
`{"worth": w, "excess": e}` tells what the last point gave (higher is better; the share by which bounds were broken),
`{"missing": true}` that there is no such point. Answer: `{"measure": [level of each dimension]}`, or null when it is done.
`quick` is QuickRunConfigGenerator with the radius and the number of initialised neighbours that Model Analyzer gives it;
`optuna` is Optuna's tree-structured Parzen estimator over the indices, as it is used there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import optuna
from model_analyzer.config.generate.coordinate_data import CoordinateData
from model_analyzer.config.generate.neighborhood import Neighborhood
from model_analyzer.config.generate.quick_run_config_generator import QuickRunConfigGenerator
from model_analyzer.config.generate.search_config import SearchConfig
from model_analyzer.config.generate.search_dimension import SearchDimension
from model_analyzer.config.generate.search_dimensions import SearchDimensions
from model_analyzer.constants import MIN_INITIALIZED, RADIUS

MISSING_WORTH = -10.0


class Measurement:
    """What the search asks of a RunConfigMeasurement, and the arithmetic that one does."""

    def __init__(self, worth: float, excess: float) -> None:
        self.worth, self.excess = worth, excess

    def is_passing_constraints(self) -> bool:
        """Whether all bounds are met."""
        return self.excess <= 0

    def compare_measurements(self, other: Measurement) -> float:
        """Above 0 when the other is better, relative to their mean."""
        return (other.worth - self.worth) / ((other.worth + self.worth) / 2)

    def compare_constraints(self, other: Measurement) -> float | None:
        """Above 0 when the other is nearer to passing; None when one passes."""
        if self.is_passing_constraints() or other.is_passing_constraints():
            return None
        return self.excess - other.excess

    def __lt__(self, other: Measurement) -> bool:
        return self.worth < other.worth


class Quick(QuickRunConfigGenerator):
    """The hill climbing alone, without Triton's configurations around it."""

    def __init__(self, sizes: list[int]) -> None:
        dimensions = SearchDimensions()
        for n, size in enumerate(sizes):
            dimensions.add_dimensions(n, [SearchDimension(f"d{n}", SearchDimension.DIMENSION_TYPE_LINEAR, 0, size - 1)])
        self._search_config = SearchConfig(dimensions=dimensions, radius=RADIUS, min_initialized=MIN_INITIALIZED)
        self._coordinate_data = CoordinateData()
        self._home_coordinate = self._get_starting_coordinate()
        self._coordinate_to_measure = self._best_coordinate = self._home_coordinate
        self._best_measurement = None
        self._neighborhood = Neighborhood(
            self._search_config.get_neighborhood_config(), self._home_coordinate, self._coordinate_data
        )
        self._home_has_passed = self._done = False

    def _print_debug_logs(self, measurements: Any) -> None:
        pass

    def ask(self) -> list[int] | None:
        """Return the next point, or None when done."""
        return None if self._done else [int(v) for v in self._coordinate_to_measure]

    def tell(self, measurement: Measurement | None) -> None:
        """Take what the last point gave, and step."""
        self.set_last_results([measurement])
        self._step()


class Optuna:
    """Ask and tell."""

    def __init__(self, sizes: list[int], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        self._sizes = sizes

    def ask(self) -> list[int] | None:
        """Return the next point."""
        self._trial = self._study.ask()
        return [self._trial.suggest_int(f"d{n}", 0, size - 1) for n, size in enumerate(self._sizes)]

    def tell(self, measurement: Measurement | None) -> None:
        """Take what the last point gave."""
        if measurement is None:
            self._study.tell(self._trial, MISSING_WORTH)
        else:
            self._study.tell(self._trial, measurement.worth if measurement.excess <= 0 else -measurement.excess)


def main() -> None:
    """Answer until standard input ends."""
    print(json.dumps({"ready": True}), flush=True)
    search: Quick | Optuna | None = None
    for line in sys.stdin:
        order = json.loads(line)
        if "new" in order:
            search = Quick(order["sizes"]) if order["new"] == "quick" else Optuna(order["sizes"], order["seed"])
        else:
            assert search is not None
            search.tell(None if order.get("missing") else Measurement(order["worth"], order["excess"]))
        print(json.dumps({"measure": search.ask()}), flush=True)


if __name__ == "__main__":
    main()
