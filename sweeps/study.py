"""Read and check study files. The following text is an example of a study file:

name = "lr"
preset = "optimized"
[set]                     # config fields that have the same value in every trial
dev_frac = 0.1
[space.lr]                # the name of a config field, or a path such as "growth.ops.1.value"
low = 1e-3
high = 3e-2
log = true
[space.momentum]
values = [0.9, 0.95]
when = { optimizer = ["muon", "sgd"] }
[budget]                  # the study ends when the first of these limits is reached
trials = 24
[rungs]
at = [0.25, 0.5]          # positions of the rungs, as fractions of the total steps of a trial
score = "branch"          # compare trials after a short decay of the learning rate (see branch.py)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError, nearest
from mainrun.files import inputs
from mainrun.files.hashing import sha256_json
from mainrun.plan.recipes import load
from sweeps import branch, late_change, space
from sweeps.sampling import SamplerSettings
from sweeps.space import Choice, Range

BUILT_IN = Path(__file__).parent / "studies"
FRUGAL_ONLY = {"lanes", "horizons", "late"}  # the keys of [sampler] that only the sampler frugal reads
MAX_PAIRS = 8  # the default maximum number of new seeds, if they are added one by one
FIXED_SEEDS = 5  # the default number of new seeds, if all are trained at once
MAX_FAULTS = 10  # the maximum number of sentences that suggest a correction


class StudyTable(BaseModel):
    """The base class of all tables of a study file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Budget(StudyTable):
    """The limits of a study. A study ends when the first limit is reached."""

    trials: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    tokens: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    flops: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    minutes: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    until: Annotated[
        Literal["spent", "settled"],
        Field(
            description="settled also ends a study with the sampler frugal "
            "when almost no improvement is expected"
        ),
    ] = "spent"

    def limits(self) -> dict[str, float]:
        """Return the limits that are set."""
        fields = self.model_dump(exclude={"until"})
        return {name: limit for name, limit in fields.items() if limit}


class Rungs(StudyTable):
    """The rungs of a study, where the best trials are promoted and the other trials are pruned."""

    at: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Field(min_length=1, strict=False, description="positions of the rungs, as shares of a trial's steps"),
    ] = (0.25,)
    keep: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="share of each generation that is promoted; "
            "1 promotes all trials, to measure how well the scores at rungs predict the final scores",
        ),
    ] = 0.5
    score: Annotated[
        Literal["raw", "branch"],
        Field(
            description="raw compares the scores of the trials themselves; branch compares scores after "
            "a short decay of the learning rate, and needs the schedule wsd"
        ),
    ] = "raw"
    branch: Annotated[
        float, Field(gt=0, le=1, description="length of a branch, as a share of the steps before its rung")
    ] = 0.1


class Confirmation(StudyTable):
    """The settings of the confirmation, which compares the best trials with the base on new seeds."""

    sequential: Annotated[
        bool,
        Field(
            description="whether new seeds are added one by one, until each trial is claimed or given up; "
            "if false, all seeds are trained at once"
        ),
    ] = True
    noise_seeds: Annotated[
        int,
        Field(
            ge=2,
            le=100,
            description="number of seeds of the base runs that measure the noise floor; "
            "if sequential, they are trained only if the other runs are too few",
        ),
    ] = 5
    seeds: Annotated[
        int,
        Field(
            ge=2,
            le=100,
            description="number of new seeds for the base and for each confirmed trial; "
            "if sequential, the maximum; if not, the default is 5",
        ),
    ] = MAX_PAIRS
    best: Annotated[int, Field(ge=1, le=20, description="number of trials to confirm")] = 2

    @model_validator(mode="before")
    @classmethod
    def _set_seeds(cls, data: Any) -> Any:
        """Set the default number of seeds if the confirmation is not sequential."""
        if isinstance(data, dict) and data.get("sequential") is False:
            return {"seeds": FIXED_SEEDS} | data
        return data


class Study(StudyTable):
    """The content of a study file, which defines a hyperparameter search."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]{0,59}$")]
    about: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")] = ""
    preset: str = "optimized"
    set: dict[str, Any] = {}
    space: dict[str, Range | Choice]
    objective: Literal["dev/full", "dev/official"] = "dev/full"
    budget: Budget = Budget(trials=24)
    sampler: SamplerSettings = SamplerSettings()
    rungs: Rungs | None = None
    evidence: Confirmation = Confirmation()
    threads: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="number of CPU threads of each trial, which affects the scores slightly",
        ),
    ] = 1
    workers: Annotated[
        int,
        Field(
            ge=0, le=10_000, description="number of concurrent trials, or 0 for as many as the cores allow"
        ),
    ] = 0
    engine: Annotated[
        Literal["local", "ray"], Field(description="whether workers run on this machine or on a Ray cluster")
    ] = "local"
    address: Annotated[
        str,
        Field(
            description="address of the Ray cluster: auto, or HOST:PORT of its head node; "
            "if empty, a cluster is started on this machine"
        ),
    ] = ""
    gpus: Annotated[
        float,
        Field(
            ge=0, le=64, description="number of GPUs of each trial on Ray; with 0.25, four trials share a GPU"
        ),
    ] = 0.0
    storage: Annotated[
        str,
        Field(
            repr=False,
            description="URL of the database, either sqlite:///FILE or postgresql://USER@HOST/DATABASE; "
            "if empty, a SQLite file in the study's folder is used",
        ),
    ] = ""

    @field_serializer("storage")
    def _serialize_storage(self, url: str) -> str:
        return without_password(url)  # remove the password, because the files of a study may be shared

    # Keys that do not affect the trials of a study, and that may therefore change when the study is resumed.
    FREE: ClassVar = {"about", "budget", "evidence", "workers", "engine", "address", "gpus", "storage"}

    @property
    def digest(self) -> str:
        """The hash of all keys of the study file that affect the trials."""
        data = self.model_dump(exclude=self.FREE, mode="json")
        unused = FRUGAL_ONLY if self.sampler.name != "frugal" else {"generation"}
        if self.sampler.late is None:
            unused = unused | {"late"}
        data["sampler"] = {key: value for key, value in data["sampler"].items() if key not in unused}
        return sha256_json(data)

    def base(self) -> TrainConfig:
        """Return the base config, which trial 0 trains without changes."""
        fields = {"threads": self.threads, **self.set}
        settings = [f"{key}={_setting(value)}" for key, value in fields.items()]
        configs = load(self.preset, settings)
        if len(configs) > 1:
            raise ConfigError(
                f"preset {self.preset!r} has {len(configs)} steps, but a study starts from one config; "
                f"name one of the steps, such as {configs[-1].preset!r}"
            )
        return configs[0]


def _setting(value: Any) -> str:
    """Format a value for the option `--set` of `mainrun train`."""
    return value if isinstance(value, str) else json.dumps(value)


def set_arguments(study: Study, cfg: TrainConfig) -> list[str]:
    """Return the settings in the form KEY=VALUE that turn the study's preset into the given config."""
    preset = load(study.preset)[0]
    settings = []
    for name in TrainConfig.model_fields:
        value = getattr(cfg, name)
        if name == "preset" or value == getattr(preset, name):
            continue
        if name == "growth":
            settings.append(f"growth={json.dumps(value.data())}")
        elif value is None:
            settings.append(f"{name}=none")
        else:
            settings.append(f"{name}={_setting(value)}")
    return settings


def without_password(url: str) -> str:
    """Return a database URL without its password.

    The PostgreSQL client can read the password from the variable PGPASSWORD or the file ~/.pgpass instead.
    """
    url = re.sub(r"^([\w+]+://[^:/@?]*):.*@", r"\1@", url, flags=re.DOTALL)
    return re.sub(r"(?<=[?&])(ssl)?password=[^&]*&?", "", url).rstrip("?&")


# -- reading a study


def built_in_names() -> list[str]:
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def read_study(place: str, sets: dict[str, Any] | None = None, **changes: Any) -> Study:
    """Read a built-in study or a study file.

    `sets` is merged into the [set] table of the file, and `changes` replaces other keys of the file. If the
    study is invalid, raises a ConfigError that lists all faults.
    """
    is_name = "/" not in place and not place.endswith(".toml")
    path = _study_file(place, is_name)
    try:
        data = inputs.parse_toml(_read_text(path))
    except inputs.BadInput as e:
        hint = "`mainrun sweep run demo --schema` prints the schema of a study file"
        raise ConfigError(f"study {path} is not valid TOML: {e}; {hint}") from None
    data.setdefault("name", path.stem)
    preset_changes = data.get("set", {})
    if sets and isinstance(preset_changes, dict):
        data["set"] = {**preset_changes, **sets}
    source = [place if is_name else str(path)]
    for key, value in (sets or {}).items():
        source.append(f"--set {key}={inputs.shortened(str(value), 80)}")
    for key, value in changes.items():
        option = "as" if key == "name" else key
        source.append(f"--{option} {without_password(str(value))}")
    return validate_study(data | changes, " ".join(source))


def _read_text(path: Path) -> str:
    try:
        return inputs.read_text(path)
    except inputs.BadInput as e:
        raise ConfigError(f"study {path} {e}") from None


def _study_file(place: str, is_name: bool) -> Path:
    """Return the path of a study file. `place` is either the name of a built-in study or a path."""
    names = built_in_names()
    allowed = f"allowed: {', '.join(names)}, or a file ending in .toml"
    if is_name and place in names:
        return BUILT_IN / f"{place}.toml"
    if is_name:
        raise ConfigError(f"unknown study {inputs.shown(place, 80)}{nearest(place, names)}; {allowed}")
    problem = inputs.not_a_file(Path(place))
    if problem == "does not exist":
        raise ConfigError(
            f"unknown study: there is no file {inputs.shown(place, 80)}{nearest(place, names)}; {allowed}"
        )
    if problem:
        raise ConfigError(f"study {inputs.shown(place, 80)} {problem}; {allowed}")
    return Path(place)


def validate_study(data: dict[str, Any], source: str) -> Study:
    """Check the data of a study file, and return the study.

    If the data is invalid, raises a ConfigError that lists all faults. The error message names `source` as
    the origin of the data.
    """
    try:
        study = Study.model_validate(data)
    except ValidationError as e:
        faults = list(inputs.first_ten(_validation_faults(e, data), "faults"))
    else:
        faults = list(inputs.first_ten(_study_faults(study), "faults"))
        if not faults:
            return study
    raise ConfigError("\n".join([f"study {source} cannot be searched", *faults]))


# -- faults of a study


def _validation_faults(error: ValidationError, data: dict[str, Any]) -> Iterator[str]:
    """Yield one sentence for each distinct validation error from pydantic.

    Only the first ten sentences suggest a correction, because finding a correction is slow.
    """
    seen: set[str] = set()
    for detail in error.errors():
        if _follows_from_another(detail, error):
            continue
        text = _explain(detail, data, suggest=len(seen) < MAX_FAULTS)
        if text not in seen:
            seen.add(text)
            yield text


def _follows_from_another(detail: Any, error: ValidationError) -> bool:
    """Return whether an error says that a list is too short only because some items are invalid.

    Such an error is redundant, because pydantic also reports each invalid item.
    """
    if detail["type"] != "too_short" or not detail.get("input"):
        return False
    return any(other["loc"][:-1] == detail["loc"] for other in error.errors())


TABLES: dict[str, type[BaseModel]] = {
    "": Study,
    "budget": Budget,
    "sampler": SamplerSettings,
    "rungs": Rungs,
    "evidence": Confirmation,
}
PARAMETER_KEYS = ["low", "high", "log", "step", "values", "when"]


def _explain(detail: Any, data: dict[str, Any], suggest: bool) -> str:
    """Return a sentence that explains one validation error from pydantic."""
    keys = [str(key) for key in detail["loc"] if key not in ("Range", "Choice")]
    if len(keys) > 1 and keys[0] == "space":  # the parameter is neither a Range nor a Choice
        got = inputs.shown(data["space"][keys[1]])
        return (
            f"space.{keys[1]} is not a parameter: write low and high (and log, step), or values; got {got}."
        )
    name = ".".join(keys)
    got = inputs.shown(detail.get("input"))
    if detail["type"] == "extra_forbidden":
        table = TABLES.get(".".join(keys[:-1]))
        allowed = list(table.model_fields) if table else PARAMETER_KEYS
        suggestion = nearest(keys[-1], allowed) if suggest else ""
        return f"unknown key {inputs.shortened(name, 80)}{suggestion}; allowed: {', '.join(allowed)}."
    if detail["type"] == "string_pattern_mismatch":
        allowed_text = "text on one line"
        if name == "name":
            allowed_text = "at most 60 letters, digits and _.- that start with a letter, a digit or _"
        return f"{name}={got} is not allowed; write {allowed_text}."
    if detail["type"] == "missing":
        return f"{name} is missing; write it."
    return f"{name}={got} is not allowed: {detail['msg']}."


def _study_faults(study: Study) -> Iterator[str]:
    """Yield one sentence for each fault that involves several keys of the study file or the base config."""
    try:
        base = study.base()
    except ConfigError as e:
        yield f"preset {study.preset!r} with [set]: {e}."
        return
    if not base.dev_frac:
        yield (
            "dev_frac=0 leaves no dev split for the search, and a search must not use the val split; "
            "write dev_frac = 0.1 under [set]."
        )
    yield from space.faults(study.space, base)
    if study.sampler.name == "grid" and any(_is_continuous(p) for p in study.space.values()):
        yield "sampler.name='grid' needs values, or low, high and step, for every parameter."
    if study.rungs and list(study.rungs.at) != sorted(set(study.rungs.at)):
        yield f"rungs.at={list(study.rungs.at)} is not ascending; sort the shares, and write each share once."
    yield from _storage_faults(study.storage)
    if study.rungs and study.rungs.score == "branch":
        yield from branch.faults(study.space, base)
    if study.engine != "ray" and (study.address or study.gpus):
        got = f"address={study.address!r}" if study.address else f"gpus={study.gpus:g}"
        fix = 'write engine = "ray" (--engine ray), or remove it'
        yield f"{got} with engine='local': only Ray uses it; {fix}."
    if study.engine == "ray" and base.device == "cuda" and not study.gpus:
        yield (
            "set.device='cuda' with engine='ray' and gpus=0: a trial gets only the GPUs that it requests; "
            "write gpus = 1, or a share of one."
        )
    yield from _frugal_faults(study, base)
    if not study.budget.limits():
        yield "budget is empty; write at least one of trials, tokens, flops, minutes."


def _frugal_faults(study: Study, base: TrainConfig) -> Iterator[str]:
    """Yield one sentence for each key that does not fit the sampler."""
    sampler = study.sampler
    if sampler.name != "frugal":
        for name in sorted(FRUGAL_ONLY & sampler.model_fields_set):
            yield f"sampler.{name} with sampler.name={sampler.name!r}: only frugal reads it; remove it."
        if study.budget.until == "settled":
            got = f"budget.until='settled' with sampler.name={sampler.name!r}"
            yield f"{got}: only frugal predicts scores; remove it."
        return
    if study.rungs:
        yield "sampler.name='frugal' with [rungs]: its horizons replace rungs; remove [rungs]."
    if "generation" in sampler.model_fields_set:
        yield "sampler.generation with sampler.name='frugal': it asks run by run; write lanes instead."
    if study.budget.flops:
        yield "budget.flops with sampler.name='frugal': it plans in tokens; write tokens or trials instead."
    horizons = list(sampler.horizons)
    if horizons != sorted(set(horizons)) or horizons[-1] != 1:
        yield f"sampler.horizons={horizons} must ascend and end with 1; write [0.25, 0.5, 1.0], for example."
    grows = base.growth.ops or any(name.partition(".")[0] == "growth" for name in study.space)
    if grows and horizons != [1]:
        yield (
            "sampler.horizons with growth, which is scheduled over the whole run; "
            "write horizons = [1.0], or remove growth."
        )
    if base.max_steps and horizons != [1]:
        yield "sampler.horizons with max_steps: write horizons = [1.0], or set epochs instead of max_steps."
    if sampler.late is not None:
        yield from late_change.faults(study.space, base, sampler.late)


def _is_continuous(parameter: Range | Choice) -> bool:
    return isinstance(parameter, Range) and parameter.step is None


def _storage_faults(url: str) -> Iterator[str]:
    if re.fullmatch(r"sqlite:///(:memory:|file::memory:.*)?", url):
        yield f"storage={url!r} is in memory and would be lost; write sqlite:///FILE."
    elif url and not re.match(r"(sqlite:///|postgresql(\+\w+)?://)", url):
        yield (
            f"storage={without_password(url)!r} is not allowed; "
            "write sqlite:///FILE or postgresql://USER@HOST/DATABASE."
        )
    elif url.startswith("postgresql") and re.search("[@/].*@", url.partition("://")[2]):
        yield (
            "storage: in the password of a URL, write @ as %40 and / as %2F; "
            "or omit the password and set PGPASSWORD."
        )


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of study files, which editors use to complete and check TOML files.

    The file sweeps/schemas/study.json contains this schema. Renew it with `mainrun sweep run demo --schema`.
    """
    from mainrun.plan.preset_schema import DIALECT, config_fields

    schema = Study.model_json_schema()
    fields = config_fields(none={"const": "none"})
    schema["properties"]["set"] |= {"properties": fields, "additionalProperties": False}
    parameter = schema["properties"]["space"].pop("additionalProperties")
    searchable = {}
    for name in space.searchable_names():
        about = fields.get(name, {}).get(
            "description", "time constant of weight decay, as a share of the run"
        )
        if space.may_be_searched(name) and name != "growth":
            searchable[name] = parameter | {"description": about}
    schema["properties"]["space"] |= {
        "properties": searchable,
        "patternProperties": {r"^growth(\.|$)": parameter},
        "additionalProperties": False,
        "minProperties": 1,
    }
    schema["required"].remove("name")  # the default is the name of the file
    return {"$schema": DIALECT, **schema, "title": "mainrun study"}
