"""Tests what a summary says about the cost of its run, also if an older version wrote the summary."""

from typing import Any

import pytest

from mainrun.store import costs

OLD: dict[str, Any] = {"presentations": {"presentations_per_token": 7.0}, "tokens": 100}


def counted(passes: int, members: int) -> dict[str, Any]:
    return {"presentations": {"forward_passes": passes, "ensemble_members": members}, "tokens": 100}


def test_an_old_summary_is_of_one_model_and_one_pass() -> None:
    assert costs.members(OLD) == costs.presentations_per_epoch(OLD) == 1
    assert costs.machine(OLD) == "unknown"
    assert costs.forward_flops(OLD) is None
    assert costs.forward_flops(OLD | {"flops": 600.0}) == 2


@pytest.mark.parametrize(("passes", "members", "presentations"), [(1, 1, 1), (2, 1, 2), (1, 4, 4), (2, 4, 8)])
def test_passes_and_members_are_presentations(passes: int, members: int, presentations: int) -> None:
    summary = counted(passes, members)
    assert costs.members(summary) == members
    assert costs.presentations_per_epoch(summary) == presentations
    flops = 3 * 100 * passes * members * 7.0  # 7 FLOPs of one member for each token of a forward pass
    assert costs.forward_flops(summary | {"flops": flops}) == 7 * members, "every member scores each token"


def test_the_model_is_scored_at_its_last_size() -> None:
    grown = {"flops": 600.0, "segments": [{"flops_per_token": 30}, {"flops_per_token": 60}]}
    assert costs.forward_flops(OLD | grown) == 20
    assert costs.forward_flops(OLD | grown | {"routing": {"forward_flops": 5}}) == 5


CPU = {"device": "a processor", "threads": 2, "processes": 1, "dtype": "float32", "compile": False}


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ([CPU], "a processor, 2 threads, float32"),
        ([CPU | {"threads": 1, "compile": True}], "a processor, 1 thread, float32, compiled"),
        ([CPU | {"processes": 4}], "a processor, 4 processes, 2 threads, float32"),
        ([{"device": "a GPU"}], "a GPU"),
        ([CPU, {"device": "a GPU"}, CPU], "a processor, 2 threads, float32; a GPU"),
    ],
)
def test_the_machine_in_words(classes: list[dict[str, Any]], text: str) -> None:
    assert costs.machine(OLD | {"machine_class": {"device": "the last"}, "machine_classes": classes}) == text
    if len(classes) == 1:
        assert costs.machine(OLD | {"machine_class": classes[0]}) == text
