"""Scenarios that failed once, each a file of JSON beside this: what it asks for, with which seeds of the loop, and what it found.

They say everything themselves, so that they stay what they are when the drawing of scenarios changes.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.simulation.scenario import Disturbance, Fault, Scenario, Wish

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Regression:
    """A scenario, and the seeds of the loop with which it failed; several, since any change of the product moves what happens."""

    found: str
    seeds: tuple[int, ...]
    scenario: Scenario

    @property
    def scenarios(self) -> list[Scenario]:
        return [replace(self.scenario, seed=seed) for seed in self.seeds]


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> Regression:
    """Raises FileNotFoundError."""
    fields = json.loads(_path(name).read_text(encoding="utf-8"))
    return Regression(fields["found"], tuple(fields["seeds"]), _scenario(fields["scenario"]))


def record(name: str, regression: Regression) -> Path:
    """Where it was written to."""
    fields = {"found": regression.found, "seeds": regression.seeds, "scenario": _plain(regression.scenario)}
    path = _path(name)
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    return path


def _path(name: str) -> Path:
    return FOLDER / f"{name}.json"


def _plain(scenario: Scenario) -> dict[str, Any]:
    """Without the seed, which is told beside it."""
    fields = asdict(scenario)
    del fields["seed"]
    for disturbance in fields["disturbances"]:
        disturbance["fault"] = disturbance["fault"].value
    return fields


def _scenario(fields: dict[str, Any]) -> Scenario:
    wishes = [Wish(**_with_tuples(each)) for each in fields.pop("wishes")]
    disturbances = [Disturbance(**{**each, "fault": Fault(each["fault"])}) for each in fields.pop("disturbances")]
    return Scenario(seed=0, wishes=tuple(wishes), disturbances=tuple(disturbances), **_with_tuples(fields))


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
