"""A study file: what is searched, by which sampler, for how much. TOML in, a checked `Study` out, with everything that is wrong at once.

name = "lr"
preset = "optimized"
[set]                     # on top of the preset, in every trial
dev_frac = 0.1
[space.lr]                # a config field, or a path into the growth schedule like "growth.ops.1.trigger.budget_frac"
low = 1e-3
high = 3e-2
log = true
[space.momentum]
values = [0.9, 0.95]
when = { optimizer = ["muon", "sgd"] }
[budget]                  # the first that ends
trials = 24
[rungs]
at = [0.25, 0.5]          # shares of a trial's steps; the best `keep` of a generation go on from their checkpoints
score = "branch"          # by what they score after a short decay (sweeps/branch.py), not at their peak rate
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError, nearest
from mainrun.files import inputs
from mainrun.files.hashing import sha256_json
from mainrun.plan.recipes import load
from sweeps import branch
from sweeps.space import Choice, Range, faults

BUILT_IN = Path(__file__).parent / "studies"


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Budget(Part):
    """The first of these that is spent ends the study."""

    trials: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    tokens: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    flops: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    minutes: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None


class Sampler(Part):
    name: Literal["tpe", "gp", "cmaes", "random", "grid", "qmc"] = "tpe"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    startup: Annotated[int, Field(ge=1, le=10_000, description="random trials before the sampler learns")] = 8
    generation: Annotated[
        int,
        Field(
            ge=1,
            le=1000,
            description="trials asked at once, from the results up to the generation before the last",
        ),
    ] = 4


class Rungs(Part):
    at: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Field(min_length=1, strict=False, description="shares of a trial's steps"),
    ] = (0.25,)
    keep: Annotated[
        float,
        Field(gt=0, le=1, description="share of a generation that goes on; 1: all, which measures the rungs"),
    ] = 0.5
    score: Annotated[
        Literal["raw", "branch"],
        Field(
            description="raw: where the trial stands; branch: after a short decay of its own (wsd), beside it"
        ),
    ] = "raw"
    branch: Annotated[
        float,
        Field(gt=0, le=1, description="steps that a branch goes beyond its rung, as a share of those so far"),
    ] = 0.1


class Evidence(Part):
    noise_seeds: Annotated[
        int, Field(ge=2, le=100, description="other seeds of the base: the noise floor")
    ] = 5
    seeds: Annotated[int, Field(ge=2, le=100, description="fresh seeds that confirm")] = 5
    best: Annotated[int, Field(ge=1, le=20, description="trials that are confirmed")] = 2


class Study(Part):
    name: Annotated[str, Field(pattern=r"^\w[\w.-]{0,59}$")]
    about: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")] = ""
    preset: str = "optimized"
    set: dict[str, Any] = {}
    space: dict[str, Range | Choice]
    objective: Literal["dev/full", "dev/official"] = "dev/full"
    budget: Budget = Budget(trials=24)
    sampler: Sampler = Sampler()
    rungs: Rungs | None = None
    evidence: Evidence = Evidence()
    threads: Annotated[
        int, Field(ge=1, le=1024, description="of a trial: they change its bits, so they are the study's")
    ] = 1
    workers: Annotated[int, Field(ge=0, le=10_000, description="0: as many as the cores hold")] = 0
    engine: Annotated[
        Literal["local", "ray"], Field(description="who starts the workers: this machine, or a Ray cluster")
    ] = "local"
    address: Annotated[
        str,
        Field(
            description="Ray: auto, or HOST:PORT of a cluster's head; empty: one of our own on this machine"
        ),
    ] = ""
    gpus: Annotated[float, Field(ge=0, le=64, description="Ray: of a trial; 0.25 puts four on a GPU")] = 0.0
    storage: Annotated[
        str,
        Field(
            repr=False,
            description="sqlite:///FILE or postgresql://USER@HOST/DATABASE; empty: SQLite in the study's folder",
        ),
    ] = ""

    @field_serializer("storage")
    def _written(self, url: str) -> str:
        return without_password(url)  # what is written of a study is handed on

    # what may change while a study goes on: how much of it there is, who trains it, where it is written
    FREE: ClassVar = {"about", "budget", "evidence", "workers", "engine", "address", "gpus", "storage"}

    @property
    def digest(self) -> str:
        """Of all that decides what the trials are."""
        data = self.model_dump(exclude=self.FREE, mode="json")
        return sha256_json(data)

    def base(self) -> TrainConfig:
        """Trial 0, and what all others change."""
        found = load(
            self.preset,
            [f"{key}={_toml(value)}" for key, value in {"threads": self.threads, **self.set}.items()],
        )
        if len(found) > 1:
            raise ConfigError(
                f"preset {self.preset!r} has {len(found)} steps, a study begins with one; write {found[-1].preset!r}, say"
            )
        return found[0]


def _toml(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def without_password(url: str) -> str:
    """libpq finds it elsewhere: PGPASSWORD, ~/.pgpass."""
    url = re.sub(r"^([\w+]+://[^:/@?]*):.*@", r"\1@", url, flags=re.DOTALL)
    return re.sub(r"(?<=[?&])(ssl)?password=[^&]*&?", "", url).rstrip("?&")


def names() -> list[str]:
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def read(place: str, sets: dict[str, Any] | None = None, **changes: Any) -> Study:
    """A built-in study or a file; `sets` go on top of its [set], `changes` of its keys. A ConfigError names every fault."""
    built_in = "/" not in place and not place.endswith(".toml")
    path = _file_of(place, built_in)
    try:
        text = inputs.read_text(path)
    except inputs.BadInput as e:
        raise ConfigError(f"study {path} {e}") from None
    try:
        data = inputs.parse_toml(text)
    except inputs.BadInput as e:
        hint = "write a study as `mainrun sweep run demo --schema` describes it"
        raise ConfigError(f"study {path} is not valid TOML: {e}; {hint}") from None
    data.setdefault("name", path.stem)
    if sets:
        data["set"] = (
            {**data.get("set", {}), **sets} if isinstance(data.get("set", {}), dict) else data["set"]
        )
    given = [f"--set {key}={inputs.shortened(str(value), 80)}" for key, value in (sets or {}).items()]
    given += [
        f"--{'as' if key == 'name' else key} {without_password(str(value))}" for key, value in changes.items()
    ]
    return checked(data | changes, " ".join([place if built_in else str(path), *given]))


def _file_of(place: str, built_in: bool) -> Path:
    known = names()
    allowed = f"allowed: {', '.join(known)}, or a file ending in .toml"
    if built_in and place in known:
        return BUILT_IN / f"{place}.toml"
    if built_in:
        raise ConfigError(f"unknown study {inputs.shown(place, 80)}{nearest(place, known)}; {allowed}")
    why = inputs.not_a_file(Path(place))
    if why == "does not exist":
        raise ConfigError(
            f"unknown study {inputs.shown(place, 80)}{nearest(place, known)}, no such file; {allowed}"
        )
    if why:
        raise ConfigError(f"study {inputs.shown(place, 80)} {why}; {allowed}")
    return Path(place)


def checked(data: dict[str, Any], where: str) -> Study:
    try:
        study = Study.model_validate(data)
    except ValidationError as e:
        named = inputs.first_ten(_explain(e, data), "faults")
        raise ConfigError("\n".join([f"study {where} cannot be searched", *named])) from None
    if wrong := list(inputs.first_ten(_wrong(study), "faults")):
        raise ConfigError("\n".join([f"study {where} cannot be searched", *wrong]))
    return study


def _explain(e: ValidationError, data: dict[str, Any]) -> Iterator[str]:
    """Each fault once. A name is compared with those that are allowed only as long as a person reads on."""
    seen: set[str] = set()
    for error in e.errors():
        if _holds_others(error, e):
            continue
        text = _fault(error, data, guess=len(seen) < 10)
        if text not in seen:
            seen.add(text)
            yield text


def _holds_others(error: Any, e: ValidationError) -> bool:
    """A list is too short because what was in it is wrong, and that is said."""
    if error["type"] != "too_short" or not error.get("input"):
        return False
    return any(other["loc"][:-1] == error["loc"] for other in e.errors())


PARTS: dict[str, type[BaseModel]] = {
    "": Study,
    "budget": Budget,
    "sampler": Sampler,
    "rungs": Rungs,
    "evidence": Evidence,
}


def _fault(error: Any, data: dict[str, Any], guess: bool) -> str:
    place = [str(part) for part in error["loc"] if part not in ("Range", "Choice")]
    if len(place) > 1 and place[0] == "space":  # it fits neither of the two kinds
        got = inputs.shown(data["space"][place[1]])
        return f"space.{place[1]} is no parameter: write low and high (and log, step), or values; got {got}."
    name, got = ".".join(place), inputs.shown(error.get("input"))
    if error["type"] == "extra_forbidden":
        parent = PARTS.get(".".join(place[:-1]))
        allowed = list(parent.model_fields) if parent else ["low", "high", "log", "step", "values", "when"]
        meant = nearest(place[-1], allowed) if guess else ""
        return f"unknown key {inputs.shortened(name, 80)}{meant}; allowed: {', '.join(allowed)}."
    if error["type"] == "string_pattern_mismatch":
        instead = (
            "letters, digits and _.- (60 of them at most, a letter, digit or _ first)"
            if name == "name"
            else "text on one line"
        )
        return f"{name}={got} is not allowed; write {instead}."
    if error["type"] == "missing":
        return f"{name} is missing; write it."
    return f"{name}={got} is not allowed: {error['msg']}."


def _wrong(study: Study) -> Iterator[str]:
    try:
        base = study.base()
    except ConfigError as e:
        yield f"preset {study.preset!r} with [set]: {e}."
        return
    if not base.dev_frac:
        yield "dev_frac=0: there is no dev split to search on, and val must not be looked at; write dev_frac = 0.1 under [set]."
    yield from faults(study.space, base)
    if study.sampler.name == "grid" and any(
        isinstance(p, Range) and p.step is None for p in study.space.values()
    ):
        yield "sampler.name='grid' needs values, or a step with low and high, for every parameter."
    if study.rungs and list(study.rungs.at) != sorted(set(study.rungs.at)):
        yield f"rungs.at={list(study.rungs.at)} is not ascending; write shares of the steps, each above the one before."
    url = study.storage
    if re.fullmatch(r"sqlite:///(:memory:|file::memory:.*)?", url):
        yield f"storage={url!r} is in memory, and would be lost; write sqlite:///FILE."
    elif url and not re.match(r"(sqlite:///|postgresql(\+\w+)?://)", url):
        yield f"storage={without_password(url)!r} is not allowed; write sqlite:///FILE or postgresql://USER@HOST/DATABASE."
    elif url.startswith("postgresql") and re.search("[@/].*@", url.partition("://")[2]):
        yield "storage: a password has @ as %40 and / as %2F in a URL; write these, or leave it to PGPASSWORD."
    if study.rungs and study.rungs.score == "branch":
        yield from branch.faults(study.space, base)
    if study.engine != "ray" and (study.address or study.gpus):
        got = f"address={study.address!r}" if study.address else f"gpus={study.gpus:g}"
        yield f"{got} with engine='local': it is for Ray's; write engine = \"ray\" (--engine ray), or remove it."
    if study.engine == "ray" and base.device == "cuda" and not study.gpus:
        yield "set.device='cuda' with engine='ray' and gpus=0: Ray gives a GPU to who asks for it; write gpus = 1, or a share of one."
    if not any(study.budget.model_dump().values()):
        yield "budget is empty; write at least one of trials, tokens, flops, minutes."


def schema() -> dict[str, Any]:
    """The JSON schema of a study file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mainrun study",
        **Study.model_json_schema(),
    }
