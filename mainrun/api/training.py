"""Train a run from Python, with the same run directory and the same bits as `mainrun train`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mainrun.api.calls import Place, config_fields, path_of, plain_errors, recorded_command, set_options
from mainrun.api.runs import Run
from mainrun.config import TrainConfig, from_dict
from mainrun.errors import DiskFull, Interrupted, UsageError
from mainrun.plan.recipes import load, preset_names


def train(
    preset: Place | TrainConfig = "optimized",
    *,
    out: Place = "runs",
    fresh: bool = False,
    until: int = 0,
    store: Place | bool = True,
    store_size: str = "20GB",
    track: str | Iterable[str] = (),
    quiet: bool = False,
    **fields: Any,
) -> Run:
    """Train a preset, or resume its run, and return the run.

    The run directory and the bits are those of `mainrun train`. A finished run is not trained again.
    An interrupt (Ctrl-C, or the stop button of a notebook) stops the run after the current training step and
    raises `Interrupted`. The same call then resumes the run.

    preset: a built-in name, NAME:STEP, a TOML file, or a config.
    fields: config fields that replace those of the preset, such as `lr=0.01`.
    out: the folder of the run directories.
    fresh: discard the earlier results of the run and start over.
    until: stop after this step, and return the unfinished run. 0 trains to the end.
    store: where the states that runs share are stored. True: OUT/.store, or MAINRUN_STORE if that variable is
        set; False: share no steps.
    track: trackers that get the metrics: "tensorboard", "wandb[:PROJECT]" or "trackio[:PROJECT]".
    quiet: show no progress on stderr.
    """
    from mainrun.run.stop import StopSignal
    from mainrun.run.tracking import parse_trackers
    from mainrun.ui.console import process_group
    from mainrun.ui.store_cli import open_store
    from mainrun.ui.train_cli import TrainOptions, train_all

    if not isinstance(until, int) or until < 0:
        raise UsageError(f"got until={until!r}; give a step, or 0 for the end of the run")
    given = config_fields(train, fields)
    cfg = _config(preset, given)
    folder = path_of(out, "out")
    trackers = parse_trackers([track] if isinstance(track, str) else track)
    shared = None
    if store is not False:
        shared = open_store(None if store is True else str(store), folder, store_size)
    options = TrainOptions(folder, fresh, quiet, until, shared, trackers, [])
    with plain_errors(), recorded_command(_command(preset, given, folder)), process_group():
        try:
            train_all([cfg], options)
        except DiskFull:
            raise
        except Interrupted:
            if not until or StopSignal.last:
                raise
    return Run(folder / cfg.run_id)


def _config(preset: Place | TrainConfig, fields: dict[str, Any]) -> TrainConfig:
    """Return the config of a run. Raise UsageError if a preset has several steps."""
    if isinstance(preset, TrainConfig):
        return from_dict(preset.model_dump() | fields) if fields else preset
    configs = load(str(Path(preset)) if isinstance(preset, Path) else preset, **fields)
    if len(configs) == 1:
        return configs[0]
    steps = ", ".join(repr(cfg.preset) for cfg in configs)
    raise UsageError(
        f"preset {str(preset)!r} has {len(configs)} steps; train one of them: {steps}; "
        f"or train each: [mainrun.train(cfg) for cfg in mainrun.load({str(preset)!r})]"
    )


def _command(preset: Place | TrainConfig, fields: dict[str, Any], out: Path) -> list[str]:
    """Return the command that trains the same run."""
    if isinstance(preset, TrainConfig):
        name = preset.preset
        base = load(name)[0] if name.partition(":")[0] in preset_names() else TrainConfig()
        given = preset.model_dump() | fields
        fields = {key: value for key, value in given.items() if value != base.model_dump()[key]}
        preset = name
    return ["mainrun", "train", "--preset", str(preset), *set_options(fields), "--out", str(out)]
