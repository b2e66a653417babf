"""The recorded tables: the scores of all recipes of a small lattice, on several seeds.

A search can be measured on a table without training, and gets exactly the scores that the trainer gives. A
table is one Parquet file. A row is an evaluation on dev:

    seed, trunk, step, dev                     of the steps that all runs of a trunk share
    seed, trunk, decay, horizon, step, dev     of a run of its own, after its learning rate began to decay

A run that diverged has rows without a score. The file's metadata contains the definition of the table, the
config of its base, the versions of all code and the machine class that trained it, the fingerprints of the
data, and a checksum of everything. The costs of runs are not recorded, because they follow from their plans.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mainrun.config import TrainConfig
from mainrun.errors import RunError, UsageError, nearest
from mainrun.files.hashing import sha256_json
from mainrun.files.inputs import not_a_file
from mainrun.plan.plan import Plan
from mainrun.store.rundir import write_bytes
from sweeps.frugal import recipe_key
from sweeps.sampling import SamplerSettings
from sweeps.short_run import short_run
from sweeps.space import Choice, Range, with_values
from sweeps.study import Budget, Study

RECORDED = Path(__file__).parent / "recorded"  # the tables that the package contains
FINALISTS = 24  # the recipes that are trained on fresh seeds
EASY_SHARE = 0.03  # a table is too easy if a larger share of the recipes is good
CAP = 60  # a search ends after the tokens of this many whole runs

Values = dict[str, Any]


def geometric(low: float, high: float, count: int) -> list[float]:
    return [float(f"{value:.4g}") for value in np.geomspace(low, high, count)]


@dataclass(frozen=True)
class Definition:
    """What a table is."""

    name: str
    preset: str
    settings: dict[str, Any]  # the base's changes to the preset, without the seed
    trunk: dict[str, list[Any]]  # the fields that act from the start, with their ordered values
    decay: dict[str, list[Any]]  # the fields that act only from the decay on
    horizons: tuple[float, ...] = (0.25, 0.5, 1.0)
    seeds: tuple[int, ...] = (1, 2)  # the seeds to search on
    fresh_seeds: tuple[int, ...] = (11, 12, 13, 14, 15)  # the seeds of the best recipes
    points: int = 28  # the evaluations of a whole run
    skipped_titles: int = 0  # the titles begin after this number of titles of the synthetic corpus

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Definition:
        tuples = {name: tuple(table[name]) for name in ("horizons", "seeds", "fresh_seeds")}
        return cls(**{**table, **tuples})

    def base(self) -> TrainConfig:
        return self._study({}).base()

    def _study(self, sampler: dict[str, Any], budget: Budget | None = None) -> Study:
        space: dict[str, Range | Choice] = {}
        for name, values in (self.trunk | self.decay).items():
            space[name] = Choice(values=values)
        return Study(
            name=f"table-{self.name}",
            preset=self.preset,
            set=self.settings,
            space=space,
            sampler=SamplerSettings(**{"name": "frugal", "horizons": self.horizons} | sampler),
            budget=budget or Budget(trials=1),
        )

    def study(self, tokens: float, sampler: dict[str, Any]) -> Study:
        return self._study(sampler, Budget(tokens=tokens))


# The tables keep the blocks and the text of the first measurements of searches (docs/log/search.md).
WITHOUT_GATES: dict[str, Any] = {
    "attn_gate": False,
    "layer_scale": 0.0,
    "value_residual": False,
    "case": "kept",
}

# The base's own lr of 0.01 and decay_frac of 0.5 are not on the lattice, so the nearest values replace them.
# val is never read, so it gets one hundredth of the titles. With val_frac=0.1, 1,700 titles would give the
# same numbers of titles in train and in dev.
TABLE_A = Definition(
    name="A",
    preset="demo:optimized",
    settings=WITHOUT_GATES
    | {
        "n_layer": 2,
        "d_model": 64,
        "batch_size": 8,
        "num_titles": 1546,
        "val_frac": 0.01,
        "dev_frac": 0.1,
        "epochs": 7,
        "eval_per_epoch": 4,
        "lr": 0.009146,
        "decay_frac": 0.6,
    },
    trunk={
        "lr": geometric(1e-3, 4e-2, 6),
        "weight_decay": [0.02, 0.1, 0.5],
        "dropout": [0.0, 0.1, 0.25],
        "batch_size": [4, 8, 16],
    },
    decay={"decay_frac": [0.2, 0.4, 0.6, 0.8]},
)
# The held-out table. The usual learning rate of AdamW is 1e-3, and the base has the nearest one.
TABLE_B = Definition(
    name="B",
    preset="demo:optimized",
    settings=WITHOUT_GATES
    | {
        "optimizer": "adamw",
        "n_layer": 3,
        "d_model": 48,
        "block_size": 96,
        "batch_size": 8,
        "num_titles": 4400,
        "val_frac": 0.01,
        "dev_frac": 0.05,
        "epochs": 3,
        "eval_per_epoch": 9,
        "lr": 0.0007536,
        "lr_aux": 0.0,
        "beta2": 0.95,
        "warmup_frac": 0.01,
        "label_smoothing": 0.0,
        "decay_frac": 0.6,
    },
    trunk={
        "lr": geometric(3e-4, 3e-2, 6),
        "beta2": [0.9, 0.95, 0.99],
        "warmup_frac": [0.01, 0.05, 0.15],
        "label_smoothing": [0.0, 0.05, 0.1],
    },
    decay={"decay_frac": [0.2, 0.4, 0.6, 0.8]},
    seeds=(21, 22),
    fresh_seeds=(31, 32, 33, 34, 35),
    skipped_titles=20_000,
)
DEFINITIONS = {table.name: table for table in (TABLE_A, TABLE_B)}


def definition_of(name: str) -> Definition:
    if name not in DEFINITIONS:
        allowed = ", ".join(DEFINITIONS)
        raise UsageError(f"unknown table {name!r}{nearest(name, DEFINITIONS)}; the tables are {allowed}")
    return DEFINITIONS[name]


class Row(NamedTuple):
    """An evaluation on dev. `decay` and `horizon` are None in the steps that all runs of a trunk share."""

    seed: int
    trunk: int
    decay: int | None
    horizon: float | None
    step: int
    dev: float | None  # None if the run diverged before


def combinations(fields: Mapping[str, list[Any]]) -> list[Values]:
    """Return all combinations of the values of fields. The values of the last field change first."""
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def points(plan: Plan, count: int) -> list[int]:
    """Return the steps after which a whole run is scored. All but the last one are equally spaced."""
    interval = plan.steps // count
    return [interval * number for number in range(1, count)] + [plan.steps]


def fork(plan: Plan) -> int:
    """Return the last step that a run shares with longer decays. The decay's first step has the full rate."""
    return min(plan.decay_start + 1, plan.steps)


class Lattice:
    """The recipes of a table, and the plans of their runs."""

    def __init__(self, definition: Definition, train_tokens: int) -> None:
        self.definition = definition
        self.train_tokens = train_tokens
        self.config = definition.base()
        self.choices = definition.trunk | definition.decay
        self.trunks = combinations(definition.trunk)
        self.decays = combinations(definition.decay)
        self.recipes = [trunk | decay for trunk in self.trunks for decay in self.decays]
        self.base = {name: getattr(self.config, name) for name in self.choices}
        self._places = {tuple(recipe.values()): i for i, recipe in enumerate(self.recipes)}
        self._plans: dict[int, Plan] = {}
        self.whole = self.point_tokens(self.base)[-1]  # the tokens of a whole run of the base

    def place(self, values: Values) -> int:
        """Return the position of a recipe in `recipes`. Fields without a value have that of the base."""
        unknown = [name for name in values if name not in self.choices]
        if unknown:
            allowed = ", ".join(self.choices)
            raise UsageError(
                f"the table has no field {unknown[0]!r}{nearest(unknown[0], self.choices)}; "
                f"its fields are {allowed}"
            )
        recipe = self.base | values
        try:
            return self._places[tuple(recipe.values())]
        except KeyError:
            wrong = next(name for name in recipe if recipe[name] not in self.choices[name])
            raise UsageError(
                f"{wrong}={recipe[wrong]!r} is not a value of the table; its values are {self.choices[wrong]}"
            ) from None

    def recipe(self, values: Values) -> Values:
        """Return a recipe with all its fields. Equal recipes are written equally, so their keys are equal."""
        return self.recipes[self.place(values)]

    def key(self, values: Values) -> str:
        return recipe_key(self.recipe(values))

    def trunk_and_decay(self, values: Values) -> tuple[int, int]:
        return divmod(self.place(values), len(self.decays))

    def trunk_key(self, values: Values) -> str:
        """Return a key that is equal for recipes whose runs share their trunk."""
        return recipe_key(self.trunks[self.trunk_and_decay(values)[0]])

    # -- plans and costs

    def plan(self, values: Values) -> Plan:
        """Return the plan of a whole run."""
        place = self.place(values)
        if place not in self._plans:
            cfg = with_values(self.config, self.recipes[place])
            self._plans[place] = Plan(cfg, self.train_tokens)
        return self._plans[place]

    def run_config(self, values: Values, horizon: float) -> TrainConfig:
        """Return the config of a run with the seed of the base, as a study trains it."""
        plan = self.plan(values)
        return short_run(plan.cfg, plan, horizon)

    def points(self, values: Values) -> list[int]:
        return points(self.plan(values), self.definition.points)

    def point_tokens(self, values: Values) -> list[int]:
        """Return the tokens of the whole run at each point of its curve."""
        plan = self.plan(values)
        return [plan.tokens(step) for step in self.points(values)]

    def decay_point(self, values: Values) -> int:
        """Return the number of points of the curve that lie in the trunk."""
        last = fork(self.plan(values))
        return sum(step <= last for step in self.points(values))

    def decay_tokens(self, values: Values) -> int:
        """Return the tokens after which the decay of the whole run begins."""
        plan = self.plan(values)
        return plan.tokens(fork(plan))


class Table(Lattice):
    """A recorded table."""

    def __init__(self, header: Mapping[str, Any], rows: Iterable[Row]) -> None:
        """header: the definition, train_tokens, and how the table was recorded (see record.py)."""
        self.header = dict(header)
        self.rows = list(rows)
        super().__init__(Definition.from_json(header["definition"]), header["train_tokens"])
        self._scores = {row[:5]: row.dev for row in self.rows}
        # the rows with the last step of each run
        self._final = {row[:4]: row.dev for row in sorted(self.rows, key=lambda row: row.step)}

    # -- scores

    def score(self, values: Values, horizon: float, seed: int) -> float | None:
        """Return the final score of a run, or None if it diverged."""
        trunk, decay = self.trunk_and_decay(values)
        return self._final[seed, trunk, decay, horizon]

    def curve(self, values: Values, seed: int) -> list[float | None]:
        """Return the raw scores of the whole run. The last one is its final score."""
        trunk, decay = self.trunk_and_decay(values)
        steps = self.points(values)
        shared = self.decay_point(values)
        early = [self._scores[seed, trunk, None, None, step] for step in steps[:shared]]
        return early + [self._scores[seed, trunk, decay, 1.0, step] for step in steps[shared:]]

    def mean(self, values: Values) -> float:
        """Return the quality of a recipe: its mean over the fresh seeds, or over the search seeds if it was
        not trained on fresh ones. It is infinite if a run diverged.
        """
        trunk, decay = self.trunk_and_decay(values)
        seeds = self.definition.seeds
        if (self.definition.fresh_seeds[0], trunk, decay, 1.0) in self._final:
            seeds = self.definition.fresh_seeds
        scores = self._finals(trunk, decay, seeds)
        return statistics.fmean(scores) if len(scores) == len(seeds) else math.inf

    def _finals(self, trunk: int, decay: int, seeds: Iterable[int]) -> list[float]:
        """Return the final scores of the seeds on which the run did not diverge."""
        scores = [self._final[seed, trunk, decay, 1.0] for seed in seeds]
        return [score for score in scores if score is not None]

    def best(self, count: int) -> list[int]:
        """Return the positions of the recipes with the lowest means over the search seeds."""
        seeds = self.definition.seeds
        means = []
        for trunk, decay in itertools.product(range(len(self.trunks)), range(len(self.decays))):
            scores = self._finals(trunk, decay, seeds)
            means.append(statistics.fmean(scores) if len(scores) == len(seeds) else math.inf)
        return [int(place) for place in np.argsort(means, kind="stable")[:count] if means[place] < math.inf]

    @cached_property
    def finalists(self) -> list[Values]:
        """The recipes that were trained on fresh seeds."""
        fresh = self.definition.fresh_seeds[0]
        places = {
            row.trunk * len(self.decays) + row.decay
            for row in self.rows
            if row.seed == fresh and row.decay is not None
        }
        return [self.recipes[place] for place in sorted(places)]

    @cached_property
    def sigma(self) -> float:
        """The standard deviation of a final score over seeds, pooled over the finalists."""
        seeds = self.definition.fresh_seeds
        variances = []
        for values in self.finalists:
            scores = self._finals(*self.trunk_and_decay(values), seeds)
            if len(scores) == len(seeds):
                variances.append(statistics.variance(scores))
        return math.sqrt(statistics.fmean(variances))

    @cached_property
    def best_known(self) -> float:
        """The lowest mean over the fresh seeds."""
        return min(self.mean(values) for values in self.finalists)

    @cached_property
    def good(self) -> frozenset[str]:
        """The keys of the finalists whose mean is within one sigma of the best known mean."""
        limit = self.best_known + self.sigma
        return frozenset(recipe_key(values) for values in self.finalists if self.mean(values) <= limit)

    def study(self, **sampler: Any) -> Study:
        """Return a study that searches the table with the sampler frugal, and has the largest budget."""
        return self.definition.study(float(CAP * self.whole), sampler)

    def verdict(self) -> list[str]:
        """Return lines that say how hard the table is."""
        share = len(self.good) / len(self.recipes)
        base_is_good = self.key({}) in self.good
        lines = [
            f"table {self.definition.name}: {len(self.recipes)} recipes, R = {self.whole:,} tokens; "
            f"sigma {self.sigma:.5f}, best known mean {self.best_known:.5f}, base {self.mean({}):.5f}",
            f"{len(self.good)} recipes are good ({100 * share:.1f}%); "
            f"the base is {'' if base_is_good else 'not '}one of them",
        ]
        if share > EASY_SHARE or base_is_good:
            lines.append(
                f"the table is too easy: more than {100 * EASY_SHARE:.0f}% of its recipes are good, "
                "or the base is; change the table before a method is run on it"
            )
        return lines

    # -- the file

    @property
    def checksum(self) -> str:
        return sha256_json([self.header, self.rows])

    def missing(self) -> str:
        """Return what the table lacks, or an empty string."""
        for seed in self.definition.seeds:
            for values in self.recipes:
                try:
                    self.curve(values, seed)
                    for horizon in self.definition.horizons:
                        self.score(values, horizon, seed)
                except KeyError:
                    return f"the scores of {values} with seed {seed}"
        return "" if self.finalists else "the scores with fresh seeds"

    def write(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([row._asdict() for row in self.rows], _schema())
        # the rows refer to recipes by their place, so the order of the fields must be kept
        metadata = {"header": json.dumps(self.header), "checksum": self.checksum}
        sink = pa.BufferOutputStream()
        # the bytes of scores hardly repeat, so separate streams compress better than a dictionary
        pq.write_table(
            table.replace_schema_metadata(metadata),
            sink,
            compression="zstd",
            use_dictionary=["seed", "trunk", "decay", "horizon"],
            column_encoding={"dev": "BYTE_STREAM_SPLIT", "step": "DELTA_BINARY_PACKED"},
        )
        write_bytes(path, sink.getvalue().to_pybytes())

    @classmethod
    def read(cls, place: str | Path) -> Table:
        """Read a table from a file, or one of the package's tables by its name, and check it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = find(place)
        try:
            table = pq.read_table(path)
            metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            header = json.loads(metadata["header"])
            read = cls(header, (Row(**row) for row in table.to_pylist()))
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as e:
            raise _damaged(path, f"it is not a recorded table ({type(e).__name__})") from None
        if read.checksum != metadata.get("checksum"):
            raise _damaged(path, "its checksum differs")
        missing = read.missing()
        if missing:
            raise _damaged(path, f"it lacks {missing}")
        return read


def _schema() -> Any:
    import pyarrow as pa

    types = {
        "seed": pa.int64(),
        "trunk": pa.int32(),
        "decay": pa.int32(),
        "horizon": pa.float64(),
        "step": pa.int32(),
        "dev": pa.float64(),
    }
    return pa.schema(list(types.items()))


def find(place: str | Path) -> Path:
    """Return the path of a table, which is given by its path or by the name of a table of the package."""
    name = str(place)
    if name in DEFINITIONS:
        path = RECORDED / f"{name}.parquet"
        if not path.exists():
            raise UsageError(
                f"table {name} is not recorded; record it with `mainrun bench search --record {name}`, "
                "and give the path of the file"
            )
        return path
    why = not_a_file(Path(place))
    if why:
        names = ", ".join(DEFINITIONS)
        raise UsageError(f"table {name} {why}; give the path of a recorded table, or {names}")
    return Path(place)


def _damaged(path: Path, why: str) -> RunError:
    return RunError(f"{path} is damaged: {why}; restore the file, or record the table again")


def header_of(definition: Definition, **facts: Any) -> dict[str, Any]:
    """Return the header of a table in the form in which a file contains it."""
    header: dict[str, Any] = json.loads(json.dumps({"definition": asdict(definition), **facts}))
    return header
