"""Check before training that each split has enough tokens for a step or for its official score."""

from __future__ import annotations

from collections.abc import Mapping, Sized

from mainrun.config import TrainConfig
from mainrun.data import scoring
from mainrun.errors import ConfigError
from mainrun.plan.plan import Segment

HELD_OUT = ("val", "dev")


def check_lengths(cfg: TrainConfig, splits: Mapping[str, Sized]) -> None:
    """Raise a ConfigError that names every split that is too short.

    splits: the tokens of each split that exists.
    """
    faults = too_short(cfg, splits)
    if faults:
        raise ConfigError("\n".join(faults))


def too_short(cfg: TrainConfig, splits: Mapping[str, Sized]) -> list[str]:
    """Return one message per split that is too short."""
    faults = []
    try:
        for segment_cfg in cfg.segment_configs:
            Segment(segment_cfg).check_fits(len(splits["train"]))
    except ConfigError as e:
        faults.append(str(e))
    for split in HELD_OUT:
        if split not in splits:
            continue
        try:
            scoring.official_spans(len(splits[split]), cfg.geometry)
        except ConfigError as e:
            faults.append(f"the {split} split is too short: {e}")
    return faults


def most_rows(cfg: TrainConfig, splits: Mapping[str, Sized]) -> dict[str, int]:
    """Return the largest batch_size that each split has enough tokens for.

    A held-out split limits the batch only if the official score has the shape of the batch.
    """
    limits = {"train": splits["train"]}
    if not cfg.official_geometry:
        limits |= {split: splits[split] for split in HELD_OUT if split in splits}
    return {split: (len(tokens) - 1) // cfg.block_size for split, tokens in limits.items()}
