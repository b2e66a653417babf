"""Small runs of every kind give exactly the results that golden.py recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden
import pytest
from conftest import slow_unless

from mainrun.run import summary


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    machine = golden.machine_class()
    cases = golden.record_for(machine)
    if not cases:
        pytest.skip(
            f"tests/data/golden.jsonl has no record for {machine}; make one with python tests/golden.py"
        )
    return cases


@pytest.mark.parametrize("name", slow_unless(golden.FAST, golden.CASES))
def test_a_small_run_gives_the_recorded_bits(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name not in record:
        pytest.skip(f"{name} has no record for this machine class; add it with python tests/golden.py --add")
    monkeypatch.setattr(summary, "guards", lambda evidence: [])  # the record has no verdicts
    assert golden.train(name, tmp_path) == record[name]


def test_every_case_has_a_record_on_some_machine_class() -> None:
    assert {line["case"] for line in golden.lines()} == set(golden.CASES)


def test_every_operation_and_every_optimizer_has_a_case() -> None:
    from typing import get_args

    from mainrun.config import TrainConfig
    from mainrun.plan.ops import NAMES

    fields = [fields for _, fields in golden.CASES.values()]
    named = {op["name"] for values in fields for op in values.get("growth", {}).get("ops", ())}
    # These three ops need no case: set_eval_interval changes no result, set_eval_iters is refused, and the
    # tests of set_warmup_iters use their own schedule.
    assert set(NAMES) - named == {"set_eval_interval", "set_eval_iters", "set_warmup_iters"}
    assert {values.get("optimizer") for values in fields} >= set(
        get_args(TrainConfig.model_fields["optimizer"].annotation)
    )
    assert len(golden.CASES) >= 40
