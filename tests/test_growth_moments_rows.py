"""Test pieces, copies, schedules and state transfer on tensors that are small enough to write by hand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mainrun.core.optimizers import DEFAULT_SCHEDULE, ParamSchedule
from mainrun.growth.moments import (
    IndexMap,
    Piece,
    WidthFactors,
    along,
    by_parameter,
    param_schedules,
    scaled,
    transfer,
    width_factors,
)
from mainrun.plan.ops import Rates

W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def index(*places: int) -> Tensor:
    return torch.tensor(places)


def size(*shape: int) -> torch.Size:
    return torch.Size(shape)


# -- a piece


PIECES: dict[str, tuple[Piece, list[list[float]], list[list[bool]]]] = {
    "unchanged": (Piece("w"), [[1, 2, 3], [4, 5, 6]], [[True] * 3] * 2),
    "unchanged in each dimension": (
        Piece("w", (None, None)),
        [[1, 2, 3], [4, 5, 6]],
        [[True] * 3] * 2,
    ),
    "rows": (Piece("w", (index(1, 0, 1), None)), [[4, 5, 6], [1, 2, 3], [4, 5, 6]], [[True] * 3] * 3),
    "columns": (Piece("w", (None, index(2, 0))), [[3, 1], [6, 4]], [[True] * 2] * 2),
    "a new row": (Piece("w", (index(0, -1), None)), [[1, 2, 3], [0, 0, 0]], [[True] * 3, [False] * 3]),
    "a new row and a new column": (
        Piece("w", (index(-1, 1), index(0, -1))),
        [[0, 0], [4, 0]],
        [[False, False], [True, False]],
    ),
    "one factor": (Piece("w", (None, index(0, 2)), weight=0.5), [[0.5, 1.5], [2, 3]], [[True] * 2] * 2),
    "one factor per column": (
        Piece("w", weight=index(1, 0, 2).double()),
        [[1, 0, 6], [4, 0, 12]],
        [[True] * 3] * 2,
    ),
    "with added values": (
        Piece("w", (index(0, -1), None), weight=2.0, plus=torch.ones(2, 3)),
        [[3, 5, 7], [1, 1, 1]],
        [[True] * 3, [False] * 3],
    ),
    "new": (Piece(None), [[0, 0, 0], [0, 0, 0]], [[False] * 3] * 2),
    "new, with values": (Piece(None, plus=W.double()), [[1, 2, 3], [4, 5, 6]], [[False] * 3] * 2),
}


@pytest.mark.parametrize(("piece", "value", "known"), PIECES.values(), ids=PIECES)
def test_the_value_of_a_piece_and_its_known_elements(
    piece: Piece, value: list[list[float]], known: list[list[bool]]
) -> None:
    like = torch.zeros(len(value), len(value[0]))
    result = piece.value({"w": W}, like)
    assert result.tolist() == value and result.dtype == torch.float32
    assert piece.known(like.shape).tolist() == known
    assert W.tolist() == [[1, 2, 3], [4, 5, 6]], "the source is not changed"


def test_a_factor_of_one_returns_the_same_tensor() -> None:
    assert scaled(W, 1.0) is W and scaled(W, 0.5).tolist() == (W / 2).tolist()
    by = scaled(W.double(), torch.tensor([[2.0], [1.0]]))
    assert by.dtype == torch.float64 and by.tolist() == [[2, 4, 6], [4, 5, 6]]


def test_a_vector_broadcasts_along_a_dimension() -> None:
    assert along(index(1, 2, 3), 0, 2).shape == (3, 1) and along(index(1, 2, 3), 1, 2).shape == (1, 3)
    assert along(index(1, 2), 1, 3).shape == (1, 2, 1) and along(index(1, 2), 0, 1).shape == (2,)


# -- copies


def copies(
    pieces: dict[str, Piece], shapes: dict[str, torch.Size]
) -> list[tuple[str, list[int], str, list[int]]]:
    copied = IndexMap(pieces, {}, shapes).copies()
    return [(name, rows.tolist(), first, first_rows.tolist()) for name, rows, first, first_rows in copied]


UP, DOWN = "blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"
EXPERTS = [f"blocks.0.mlp.experts.{e}.up.weight" for e in range(3)]


def test_copied_rows_are_listed_with_their_first_copy() -> None:
    piece = Piece(UP, (index(0, 1, 0, 1, 0, -1), None))
    assert copies({UP: piece}, {UP: size(6, 3)}) == [(UP, [2, 3, 4], UP, [0, 1, 0])]
    assert copies({UP: Piece(UP, (index(0, 1, -1, -1), None))}, {UP: size(4, 3)}) == [], (
        "new rows are not copies of each other"
    )
    assert (
        copies({UP: Piece(UP)}, {UP: size(4, 3)}) == []
        and copies({UP: Piece(UP, (None, index(0, 0)))}, {UP: size(4, 2)}) == []
    )
    assert copies({UP: Piece(None, (index(0, 0), None))}, {UP: size(2, 3)}) == [], "without a source"
    assert copies({UP: Piece(UP, (index(0, 0),))}, {UP: size(2)}) == [], "vectors have no rows"
    assert (
        copies({"embed.weight": Piece("embed.weight", (index(0, 0), None))}, {"embed.weight": size(2, 3)})
        == []
    ), "only inside blocks"


def test_experts_are_copies_of_each_other_and_stacked_layers_are_not() -> None:
    twice = {UP: Piece(UP), DOWN: Piece(UP)}
    assert copies(twice, {UP: size(2, 3), DOWN: size(2, 3)}) == []
    alike = {name: Piece(UP) for name in EXPERTS}
    assert copies(alike, {name: size(2, 3) for name in EXPERTS}) == [
        (EXPERTS[1], [0, 1], EXPERTS[0], [0, 1]),
        (EXPERTS[2], [0, 1], EXPERTS[0], [0, 1]),
    ]
    shards = {
        EXPERTS[0]: Piece(UP, (index(0, 1), None)),
        EXPERTS[1]: Piece(UP, (index(2, 3), None)),
        EXPERTS[2]: Piece(UP, (index(3, 0), None)),
    }
    assert copies(shards, {name: size(2, 3) for name in EXPERTS}) == [
        (EXPERTS[2], [0], EXPERTS[1], [1]),
        (EXPERTS[2], [1], EXPERTS[0], [0]),
    ]


# -- width factors and schedules


def test_width_factors_come_from_weight_and_gradient() -> None:
    shapes = {name: size(2, 3) for name in "abcd"}
    pieces = {
        "a": Piece("a", weight=0.5, grad=0.25),
        "b": Piece("b"),
        "c": Piece("c", weight=W),
        "d": Piece("d", grad=None),
    }
    assert width_factors(IndexMap(pieces, shapes, shapes)) == {
        "a": WidthFactors(0.5, 2.0, 0.25),
        "b": WidthFactors(1.0, 1.0, 1.0),
    }
    assert width_factors(IndexMap({"a": Piece("a", grad=W)}, shapes, shapes)) == {}


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (DEFAULT_SCHEDULE, {0: 1.0, 100: 1.0}),
        (ParamSchedule(lr=0.5), {0: 0.5, 100: 0.5}),
        (ParamSchedule(lr=2.0, since=10, rewarm=4), {10: 0.5, 11: 1.0, 12: 1.5, 13: 2.0, 14: 2.0, 99: 2.0}),
        (ParamSchedule(since=10, rewarm=1), {10: 1.0, 11: 1.0}),
    ],
)
def test_a_learning_rate_warms_up_over_its_steps(schedule: ParamSchedule, steps: dict[int, float]) -> None:
    assert {step: schedule.rate(step) for step in steps} == steps
    assert ParamSchedule(1.0, 1.0, 1.0, 0, 0) == DEFAULT_SCHEDULE


def schedules_after(
    name: str, pieces: dict[str, Piece], lr: Rates, before: dict[str, ParamSchedule] | None = None
) -> dict[str, ParamSchedule]:
    shapes = {n: size(2, 3) for n in pieces}
    op: Any = SimpleNamespace(name=name, lr=lr)
    return param_schedules(before or {}, IndexMap(pieces, shapes, shapes), op, 30)


def test_new_parameters_get_a_schedule() -> None:
    pieces = {"old": Piece("old"), "restarts": Piece("old", grad=None), "made": Piece(None)}
    peak = ParamSchedule(1.5, since=30, rewarm=4)
    assert schedules_after("widen_mlp", pieces, Rates(4, 1.5)) == {"restarts": peak, "made": peak}
    assert schedules_after("widen_mlp", pieces, Rates(0, 1.5)) == {
        "restarts": ParamSchedule(1.5),
        "made": ParamSchedule(1.5),
    }, "without a warm-up there is no first step"
    assert schedules_after("widen_mlp", pieces, Rates()) == {}, (
        "parameters with the default schedule are left out"
    )


def test_only_the_second_copy_of_a_layer_counts_as_new() -> None:
    pieces = {"a": Piece("w"), "b": Piece("w"), "c": Piece("v")}
    assert schedules_after("stack_layers", pieces, Rates(4)) == {"b": ParamSchedule(1.0, since=30, rewarm=4)}
    assert schedules_after("upcycle_moe", pieces, Rates(4)) == {}


def test_schedules_are_kept_and_widening_multiplies_them() -> None:
    before = {"old": ParamSchedule(0.5, 2.0, 0.5, 7, 3), "new": ParamSchedule(9.0)}
    pieces = {"same": Piece("old", weight=0.25, grad=0.5), "new": Piece(None)}
    assert schedules_after("widen_model", pieces, Rates(), before) == {
        "same": ParamSchedule(0.5, 2.0, 0.5, 7, 3)
    }
    assert schedules_after("widen_model", pieces, Rates(width_rule="adam_1_over_n"), before) == {
        "same": ParamSchedule(0.125, 8.0, 0.25, 7, 3)
    }
    alone = schedules_after(
        "widen_model", {"a": Piece("a", weight=0.5, grad=1.0)}, Rates(width_rule="adam_1_over_n")
    )
    assert alone == {"a": ParamSchedule(0.5, 2.0, 1.0)}


# -- optimizer state


def state(**tensors: Tensor) -> dict[str, Tensor]:
    return {f"optimizer/w/{key}": value for key, value in tensors.items()}


M, V = W.clone(), W.square()
ADAM = state(exp_avg=M, exp_avg_sq=V, step=torch.tensor(9.0))


def moved(piece: Piece, *shape: int, old: tuple[int, ...] = (2, 3)) -> IndexMap:
    return IndexMap({"w": piece}, {"w": size(*old)}, {"w": size(*shape)})


def of(tensors: dict[str, Tensor], key: str) -> Any:
    return tensors[f"optimizer/w/{key}"].tolist()


@pytest.mark.parametrize("mode", ["auto", "scale", "keep", "asymmetric"])
def test_m_scales_with_the_gradient_and_v_with_its_square(mode: str) -> None:
    new_state, coverage = transfer(ADAM, moved(Piece("w", weight=0.5, grad=0.5), 2, 3), mode)
    by = 1.0 if mode == "keep" else 0.5
    assert (
        of(new_state, "exp_avg") == (M * by).tolist()
        and of(new_state, "exp_avg_sq") == (V * by * by).tolist()
    )
    assert of(new_state, "step") == 9 and coverage == 1.0
    assert (
        new_state["optimizer/w/exp_avg"] is not M
        and new_state["optimizer/w/step"] is not ADAM["optimizer/w/step"]
    ), "the state is copied"


def test_one_factor_per_row_is_squared_for_v() -> None:
    new_state, _ = transfer(ADAM, moved(Piece("w", grad=torch.tensor([[0.5], [2.0]])), 2, 3))
    assert of(new_state, "exp_avg") == [[0.5, 1, 1.5], [8, 10, 12]] and of(new_state, "exp_avg_sq") == [
        [0.25, 1, 2.25],
        [64, 100, 144],
    ]


def test_new_elements_start_with_the_mean_of_v_and_zero_momentum() -> None:
    new_state, coverage = transfer(ADAM, moved(Piece("w", (index(0, -1), None), grad=0.5), 2, 3))
    mean = (1 + 4 + 9) / 4 / 3
    assert of(new_state, "exp_avg") == [[0.5, 1, 1.5], [0, 0, 0]]
    assert new_state["optimizer/w/exp_avg_sq"][0].tolist() == [0.25, 1, 2.25]
    assert new_state["optimizer/w/exp_avg_sq"][1].tolist() == pytest.approx([mean] * 3)
    assert coverage == 0.5


def test_tensors_without_old_state_start_empty() -> None:
    nothing: dict[str, Tensor] = {}
    for piece in (Piece(None), Piece("w", grad=None), Piece("x"), Piece("w", (index(-1, -1), None))):
        assert transfer(ADAM, moved(piece, 2, 3)) == (nothing, 0.0), piece
    empty = state(exp_avg=M * 0, exp_avg_sq=V * 0, step=torch.tensor(9.0))
    assert transfer(empty, moved(Piece("w", (index(0, -1), None)), 2, 3)) == (nothing, 0.0)
    new_state, coverage = transfer(empty, moved(Piece("w"), 2, 3))
    assert len(new_state) == 3 and coverage == 1.0, "no element is new"


def test_a_tensor_that_starts_empty_does_not_affect_other_tensors() -> None:
    shapes = {"new": size(2, 3), "idle": size(2, 3), "w": size(2, 3)}
    pieces = {"new": Piece(None), "idle": Piece("idle", (index(0, -1), None)), "w": Piece("w")}
    idle = {f"optimizer/idle/{key}": value * 0 for key, value in (("exp_avg", M), ("exp_avg_sq", V))}
    for mode in ("scale", "asymmetric"):
        new_state, coverage = transfer(
            ADAM | idle, IndexMap(pieces, {"w": size(2, 3), "idle": size(2, 3)}, shapes), mode
        )
        assert new_state.keys() == ADAM.keys() and coverage == pytest.approx(1 / 3)


def test_pieces_and_index_maps_are_frozen() -> None:
    piece = Piece("w")
    with pytest.raises(FrozenInstanceError):
        piece.weight = 2.0
    with pytest.raises(FrozenInstanceError):
        moved(piece, 2, 3).old = {}


def test_momentum_is_transferred_without_a_second_moment() -> None:
    new_state, coverage = transfer(
        state(momentum_buffer=M), moved(Piece("w", (index(1, -1), None), grad=0.5), 2, 3)
    )
    assert of(new_state, "momentum_buffer") == [[2, 2.5, 3], [0, 0, 0]] and coverage == 0.5


ASYMMETRIC: dict[str, tuple[Piece, list[list[float]], float]] = {
    "rows": (Piece("w", (index(1, 0, 1), None)), [[4, 5, 6], [1, 2, 3], [0, 0, 0]], 6 / 9),
    "columns": (Piece("w", (None, index(0, 0, 2))), [[1, 0, 3], [4, 0, 6]], 4 / 6),
    "both": (Piece("w", (index(0, 0), index(1, 1))), [[2, 0], [0, 0]], 1 / 4),
    "new and first": (Piece("w", (index(-1, 1, 1), None)), [[0, 0, 0], [4, 5, 6], [0, 0, 0]], 3 / 9),
    "a new row twice": (Piece("w", (index(-1, -1, 0), None)), [[0, 0, 0], [0, 0, 0], [1, 2, 3]], 3 / 9),
}


@pytest.mark.parametrize(("piece", "momentum", "coverage"), ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_only_the_first_of_several_copies_keeps_its_momentum(
    piece: Piece, momentum: list[list[float]], coverage: float
) -> None:
    shape = (len(momentum), len(momentum[0]))
    new_state, share = transfer(ADAM, moved(piece, *shape), "asymmetric")
    assert of(new_state, "exp_avg") == momentum and share == pytest.approx(coverage)
    both, whole = transfer(ADAM, moved(piece, *shape), "scale")
    assert torch.equal(new_state["optimizer/w/exp_avg_sq"], both["optimizer/w/exp_avg_sq"])
    assert whole == pytest.approx(float(piece.known(size(*shape)).float().mean())), (
        "the mode scale keeps the momentum of every copy"
    )


def test_only_the_first_copy_keeps_a_momentum_buffer() -> None:
    new_state, _ = transfer(
        state(momentum_buffer=M), moved(Piece("w", (index(1, 1), None)), 2, 3), "asymmetric"
    )
    assert of(new_state, "momentum_buffer") == [[4, 5, 6], [0, 0, 0]]


def test_a_copy_in_a_later_tensor_keeps_no_momentum() -> None:
    pieces = {"a": Piece("w", (index(0), None)), "b": Piece("w", (index(0, 1), None)), "c": Piece("w")}
    shapes = {"a": size(1, 3), "b": size(2, 3), "c": size(2, 3)}
    new_state, coverage = transfer(ADAM, IndexMap(pieces, {"w": size(2, 3)}, shapes), "asymmetric")
    assert new_state["optimizer/a/exp_avg"].tolist() == [[1, 2, 3]]
    assert new_state["optimizer/b/exp_avg"].tolist() == [[0, 0, 0], [4, 5, 6]]
    assert new_state["optimizer/c/exp_avg"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert coverage == pytest.approx(6 / 15)


def test_used_columns_are_remembered() -> None:
    pieces = {"a": Piece("w", (None, index(0, -1))), "b": Piece("w")}
    new_state, _ = transfer(
        ADAM, IndexMap(pieces, {"w": size(2, 3)}, {"a": size(2, 2), "b": size(2, 3)}), "asymmetric"
    )
    assert new_state["optimizer/b/exp_avg"].tolist() == [[0, 2, 3], [0, 5, 6]]


def test_a_dry_run_returns_only_the_coverage() -> None:
    for piece in (Piece("w"), Piece("w", (index(0, -1), None)), Piece("w", (index(0, 0), None)), Piece(None)):
        for mode in ("scale", "keep", "reset", "asymmetric"):
            dry = transfer(ADAM, moved(piece, 2, 3), mode, dry=True)
            assert dry == ({}, transfer(ADAM, moved(piece, 2, 3), mode)[1]), (piece, mode)
    momentum = state(momentum_buffer=M)
    assert transfer(momentum, moved(Piece("w", (index(0, -1), None)), 2, 3), dry=True) == ({}, 0.5)


@pytest.mark.parametrize(("least", "passes"), [(0.0, True), (0.5, True), (0.5001, False), (1.0, False)])
def test_the_minimum_coverage(least: float, passes: bool) -> None:
    half = moved(Piece("w", (index(0, -1), None)), 2, 3)
    if passes:
        assert transfer(ADAM, half, min_coverage=least)[1] == 0.5
    else:
        with pytest.raises(
            ValueError,
            match=rf"50\.0% of the optimizer's state was transferred, but min_coverage={least:g} requires "
            "more; lower min_coverage",
        ):
            transfer(ADAM, half, min_coverage=least)
    assert transfer(ADAM, half, "reset", min_coverage=least) == ({}, 0.0)
    assert transfer({}, half, min_coverage=least) == ({}, 1.0)


def test_a_model_without_trainable_parameters_has_full_coverage() -> None:
    assert transfer(ADAM, IndexMap({}, {"w": size(2, 3)}, {}), min_coverage=1.0) == ({}, 1.0)


def test_there_are_five_modes() -> None:
    for mode in ("auto", "keep", "scale", "reset", "asymmetric"):
        transfer(ADAM, moved(Piece("w"), 2, 3), mode)
    with pytest.raises(
        ValueError, match="mode='Scale' is not allowed; use auto, keep, scale, reset, asymmetric"
    ):
        transfer(ADAM, moved(Piece("w"), 2, 3), "Scale")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer/w/exp_avg", W, ""),
        ("optimizer/a/b/exp_avg_sq", W, ""),
        ("optimizer/w/momentum_buffer", W, ""),
        ("optimizer/w/step", torch.tensor(3.0), ""),
        ("optimizer/w/step", torch.zeros(7), ""),
        (
            "model/w/exp_avg",
            W,
            "state 'model/w/exp_avg' belongs to no parameter of the model before the operation; "
            "name it optimizer/<parameter>/<key>",
        ),
        ("optimizer/v/exp_avg", W, "state 'optimizer/v/exp_avg' belongs to no parameter"),
        ("optimizer/w/max_exp_avg_sq", W, "where <key> is one of exp_avg, exp_avg_sq, momentum_buffer, step"),
        ("optimizer/exp_avg", W, "state 'optimizer/exp_avg' belongs to no parameter"),
        (
            "optimizer/w/exp_avg",
            W.T,
            "state 'optimizer/w/exp_avg' has shape (3, 2), but its parameter has shape (2, 3)",
        ),
        ("optimizer/w/momentum_buffer", W[0], "has shape (3,), but its parameter has shape (2, 3)"),
    ],
)
def test_state_that_fits_no_parameter_is_refused(name: str, value: Tensor, message: str) -> None:
    old = {"w": size(2, 3), "a/b": size(2, 3)}
    if not message:
        held = by_parameter({name: value}, old)
        parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
        assert held == {parameter: {key: value}}
        return
    with pytest.raises(ValueError) as e:
        by_parameter({name: value}, old)
    assert message in str(e.value)
