"""Where numbers and moments go, on tensors small enough to write out; and how fast what is new learns, step by step."""

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
    "as it stands": (Piece("w"), [[1, 2, 3], [4, 5, 6]], [[True] * 3] * 2),
    "as it stands, dimension by dimension": (
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
    "times a number": (Piece("w", (None, index(0, 2)), weight=0.5), [[0.5, 1.5], [2, 3]], [[True] * 2] * 2),
    "times one a column": (
        Piece("w", weight=index(1, 0, 2).double()),
        [[1, 0, 6], [4, 0, 12]],
        [[True] * 3] * 2,
    ),
    "and something more": (
        Piece("w", (index(0, -1), None), weight=2.0, plus=torch.ones(2, 3)),
        [[3, 5, 7], [1, 1, 1]],
        [[True] * 3, [False] * 3],
    ),
    "from nothing": (Piece(None), [[0, 0, 0], [0, 0, 0]], [[False] * 3] * 2),
    "from nothing, with numbers": (Piece(None, plus=W.double()), [[1, 2, 3], [4, 5, 6]], [[False] * 3] * 2),
}


@pytest.mark.parametrize(("piece", "value", "known"), PIECES.values(), ids=PIECES)
def test_a_piece_and_what_it_knows(piece: Piece, value: list[list[float]], known: list[list[bool]]) -> None:
    like = torch.zeros(len(value), len(value[0]))
    found = piece.value({"w": W}, like)
    assert found.tolist() == value and found.dtype == torch.float32
    assert piece.known(like.shape).tolist() == known
    assert W.tolist() == [[1, 2, 3], [4, 5, 6]], "the source is untouched"


def test_factors_of_one_leave_the_tensor_itself() -> None:
    assert scaled(W, 1.0) is W and scaled(W, 0.5).tolist() == (W / 2).tolist()
    by = scaled(W.double(), torch.tensor([[2.0], [1.0]]))
    assert by.dtype == torch.float64 and by.tolist() == [[2, 4, 6], [4, 5, 6]]


def test_a_vector_along_a_dimension() -> None:
    assert along(index(1, 2, 3), 0, 2).shape == (3, 1) and along(index(1, 2, 3), 1, 2).shape == (1, 3)
    assert along(index(1, 2), 1, 3).shape == (1, 2, 1) and along(index(1, 2), 0, 1).shape == (2,)


# -- copies


def copies(
    pieces: dict[str, Piece], shapes: dict[str, torch.Size]
) -> list[tuple[str, list[int], str, list[int]]]:
    found = IndexMap(pieces, {}, shapes).copies()
    return [(name, mine.tolist(), first, theirs.tolist()) for name, mine, first, theirs in found]


UP, DOWN = "blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"
EXPERTS = [f"blocks.0.mlp.experts.{e}.up.weight" for e in range(3)]


def test_rows_that_began_as_one_are_named_with_the_first() -> None:
    piece = Piece(UP, (index(0, 1, 0, 1, 0, -1), None))
    assert copies({UP: piece}, {UP: size(6, 3)}) == [(UP, [2, 3, 4], UP, [0, 1, 0])]
    assert copies({UP: Piece(UP, (index(0, 1, -1, -1), None))}, {UP: size(4, 3)}) == [], (
        "new rows are no copies of each other"
    )
    assert (
        copies({UP: Piece(UP)}, {UP: size(4, 3)}) == []
        and copies({UP: Piece(UP, (None, index(0, 0)))}, {UP: size(4, 2)}) == []
    )
    assert copies({UP: Piece(None, (index(0, 0), None))}, {UP: size(2, 3)}) == [], "without a source"
    assert copies({UP: Piece(UP, (index(0, 0),))}, {UP: size(2)}) == [], "vectors do not count"
    assert (
        copies({"embed.weight": Piece("embed.weight", (index(0, 0), None))}, {"embed.weight": size(2, 3)})
        == []
    ), "only inside blocks"


def test_a_layer_that_is_stacked_twice_is_no_copy_of_itself_but_experts_are() -> None:
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


# -- rates and param_schedules


def test_rates_follow_a_width_by_its_factors() -> None:
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
    ("mark", "steps"),
    [
        (DEFAULT_SCHEDULE, {0: 1.0, 100: 1.0}),
        (ParamSchedule(lr=0.5), {0: 0.5, 100: 0.5}),
        (ParamSchedule(lr=2.0, since=10, rewarm=4), {10: 0.5, 11: 1.0, 12: 1.5, 13: 2.0, 14: 2.0, 99: 2.0}),
        (ParamSchedule(since=10, rewarm=1), {10: 1.0, 11: 1.0}),
    ],
)
def test_a_rate_climbs_over_its_steps(mark: ParamSchedule, steps: dict[int, float]) -> None:
    assert {step: mark.rate(step) for step in steps} == steps
    assert ParamSchedule(1.0, 1.0, 1.0, 0, 0) == DEFAULT_SCHEDULE


def marked(
    name: str, pieces: dict[str, Piece], lr: Rates, before: dict[str, ParamSchedule] | None = None
) -> dict[str, ParamSchedule]:
    shapes = {n: size(2, 3) for n in pieces}
    op: Any = SimpleNamespace(name=name, lr=lr)
    return param_schedules(before or {}, IndexMap(pieces, shapes, shapes), op, 30)


def test_what_is_new_gets_a_mark() -> None:
    pieces = {"old": Piece("old"), "restarts": Piece("old", grad=None), "made": Piece(None)}
    peak = ParamSchedule(1.5, since=30, rewarm=4)
    assert marked("widen_mlp", pieces, Rates(4, 1.5)) == {"restarts": peak, "made": peak}
    assert marked("widen_mlp", pieces, Rates(0, 1.5)) == {
        "restarts": ParamSchedule(1.5),
        "made": ParamSchedule(1.5),
    }, "no climb, no beginning"
    assert marked("widen_mlp", pieces, Rates()) == {}, "what learns as all do has no mark"


def test_a_layers_second_copy_is_new_and_other_second_copies_are_not() -> None:
    pieces = {"a": Piece("w"), "b": Piece("w"), "c": Piece("v")}
    assert marked("stack_layers", pieces, Rates(4)) == {"b": ParamSchedule(1.0, since=30, rewarm=4)}
    assert marked("upcycle_moe", pieces, Rates(4)) == {}


def test_a_mark_goes_over_and_a_width_multiplies_it() -> None:
    before = {"old": ParamSchedule(0.5, 2.0, 0.5, 7, 3), "new": ParamSchedule(9.0)}
    pieces = {"same": Piece("old", weight=0.25, grad=0.5), "new": Piece(None)}
    assert marked("widen_model", pieces, Rates(), before) == {"same": ParamSchedule(0.5, 2.0, 0.5, 7, 3)}
    assert marked("widen_model", pieces, Rates(width_rule="adam_1_over_n"), before) == {
        "same": ParamSchedule(0.125, 8.0, 0.25, 7, 3)
    }
    alone = marked("widen_model", {"a": Piece("a", weight=0.5, grad=1.0)}, Rates(width_rule="adam_1_over_n"))
    assert alone == {"a": ParamSchedule(0.5, 2.0, 1.0)}


# -- moments


def state(**tensors: Tensor) -> dict[str, Tensor]:
    return {f"optimizer/w/{key}": value for key, value in tensors.items()}


M, V = W.clone(), W.square()
ADAM = state(exp_avg=M, exp_avg_sq=V, step=torch.tensor(9.0))


def moved(piece: Piece, *shape: int, old: tuple[int, ...] = (2, 3)) -> IndexMap:
    return IndexMap({"w": piece}, {"w": size(*old)}, {"w": size(*shape)})


def of(found: dict[str, Tensor], key: str) -> Any:
    return found[f"optimizer/w/{key}"].tolist()


@pytest.mark.parametrize("mode", ["auto", "scale", "keep", "asymmetric"])
def test_m_moves_with_the_gradient_and_v_with_its_square(mode: str) -> None:
    found, coverage = transfer(ADAM, moved(Piece("w", weight=0.5, grad=0.5), 2, 3), mode)
    by = 1.0 if mode == "keep" else 0.5
    assert of(found, "exp_avg") == (M * by).tolist() and of(found, "exp_avg_sq") == (V * by * by).tolist()
    assert of(found, "step") == 9 and coverage == 1.0
    assert (
        found["optimizer/w/exp_avg"] is not M and found["optimizer/w/step"] is not ADAM["optimizer/w/step"]
    ), "never the tensors themselves"


def test_a_factor_a_row_is_squared_as_well() -> None:
    found, _ = transfer(ADAM, moved(Piece("w", grad=torch.tensor([[0.5], [2.0]])), 2, 3))
    assert of(found, "exp_avg") == [[0.5, 1, 1.5], [8, 10, 12]] and of(found, "exp_avg_sq") == [
        [0.25, 1, 2.25],
        [64, 100, 144],
    ]


def test_new_elements_begin_with_the_mean_of_v_and_without_momentum() -> None:
    found, coverage = transfer(ADAM, moved(Piece("w", (index(0, -1), None), grad=0.5), 2, 3))
    mean = (1 + 4 + 9) / 4 / 3
    assert of(found, "exp_avg") == [[0.5, 1, 1.5], [0, 0, 0]]
    assert found["optimizer/w/exp_avg_sq"][0].tolist() == [0.25, 1, 2.25]
    assert found["optimizer/w/exp_avg_sq"][1].tolist() == pytest.approx([mean] * 3)
    assert coverage == 0.5


def test_what_has_no_past_restarts() -> None:
    nothing: dict[str, Tensor] = {}
    for piece in (Piece(None), Piece("w", grad=None), Piece("x"), Piece("w", (index(-1, -1), None))):
        assert transfer(ADAM, moved(piece, 2, 3)) == (nothing, 0.0), piece
    empty = state(exp_avg=M * 0, exp_avg_sq=V * 0, step=torch.tensor(9.0))
    assert transfer(empty, moved(Piece("w", (index(0, -1), None)), 2, 3)) == (nothing, 0.0)
    found, coverage = transfer(empty, moved(Piece("w"), 2, 3))
    assert len(found) == 3 and coverage == 1.0, "nothing is new, so nothing would step too far"


def test_a_tensor_that_restarts_keeps_nobody_else_from_going_on() -> None:
    shapes = {"new": size(2, 3), "idle": size(2, 3), "w": size(2, 3)}
    pieces = {"new": Piece(None), "idle": Piece("idle", (index(0, -1), None)), "w": Piece("w")}
    idle = {f"optimizer/idle/{key}": value * 0 for key, value in (("exp_avg", M), ("exp_avg_sq", V))}
    for mode in ("scale", "asymmetric"):
        found, coverage = transfer(
            ADAM | idle, IndexMap(pieces, {"w": size(2, 3), "idle": size(2, 3)}, shapes), mode
        )
        assert found.keys() == ADAM.keys() and coverage == pytest.approx(1 / 3)


def test_what_a_map_says_cannot_be_changed_afterwards() -> None:
    piece = Piece("w")
    with pytest.raises(FrozenInstanceError):
        piece.weight = 2.0
    with pytest.raises(FrozenInstanceError):
        moved(piece, 2, 3).old = {}


def test_momentum_alone_needs_no_mean() -> None:
    found, coverage = transfer(
        state(momentum_buffer=M), moved(Piece("w", (index(1, -1), None), grad=0.5), 2, 3)
    )
    assert of(found, "momentum_buffer") == [[2, 2.5, 3], [0, 0, 0]] and coverage == 0.5


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
    found, share = transfer(ADAM, moved(piece, *shape), "asymmetric")
    assert of(found, "exp_avg") == momentum and share == pytest.approx(coverage)
    both, whole = transfer(ADAM, moved(piece, *shape), "scale")
    assert torch.equal(found["optimizer/w/exp_avg_sq"], both["optimizer/w/exp_avg_sq"])
    assert whole == pytest.approx(float(piece.known(size(*shape)).float().mean())), (
        "scale keeps it for each copy"
    )


def test_a_momentum_buffer_is_left_to_the_first_copy_as_well() -> None:
    found, _ = transfer(state(momentum_buffer=M), moved(Piece("w", (index(1, 1), None)), 2, 3), "asymmetric")
    assert of(found, "momentum_buffer") == [[4, 5, 6], [0, 0, 0]]


def test_a_copy_in_another_tensor_is_no_first_either() -> None:
    pieces = {"a": Piece("w", (index(0), None)), "b": Piece("w", (index(0, 1), None)), "c": Piece("w")}
    shapes = {"a": size(1, 3), "b": size(2, 3), "c": size(2, 3)}
    found, coverage = transfer(ADAM, IndexMap(pieces, {"w": size(2, 3)}, shapes), "asymmetric")
    assert found["optimizer/a/exp_avg"].tolist() == [[1, 2, 3]]
    assert found["optimizer/b/exp_avg"].tolist() == [[0, 0, 0], [4, 5, 6]]
    assert found["optimizer/c/exp_avg"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert coverage == pytest.approx(6 / 15)


def test_used_columns_are_remembered_too() -> None:
    pieces = {"a": Piece("w", (None, index(0, -1))), "b": Piece("w")}
    found, _ = transfer(
        ADAM, IndexMap(pieces, {"w": size(2, 3)}, {"a": size(2, 2), "b": size(2, 3)}), "asymmetric"
    )
    assert found["optimizer/b/exp_avg"].tolist() == [[0, 2, 3], [0, 5, 6]]


def test_a_dry_run_is_the_share_alone() -> None:
    for piece in (Piece("w"), Piece("w", (index(0, -1), None)), Piece("w", (index(0, 0), None)), Piece(None)):
        for mode in ("scale", "keep", "reset", "asymmetric"):
            dry = transfer(ADAM, moved(piece, 2, 3), mode, dry=True)
            assert dry == ({}, transfer(ADAM, moved(piece, 2, 3), mode)[1]), (piece, mode)
    momentum = state(momentum_buffer=M)
    assert transfer(momentum, moved(Piece("w", (index(0, -1), None)), 2, 3), dry=True) == ({}, 0.5)


@pytest.mark.parametrize(("least", "passes"), [(0.0, True), (0.5, True), (0.5001, False), (1.0, False)])
def test_the_least_coverage(least: float, passes: bool) -> None:
    half = moved(Piece("w", (index(0, -1), None)), 2, 3)
    if passes:
        assert transfer(ADAM, half, min_coverage=least)[1] == 0.5
    else:
        with pytest.raises(
            ValueError,
            match=rf"50\.0% of the optimiser's state went over, min_coverage={least:g} asks for more; lower it",
        ):
            transfer(ADAM, half, min_coverage=least)
    assert transfer(ADAM, half, "reset", min_coverage=least) == ({}, 0.0)
    assert transfer({}, half, min_coverage=least) == ({}, 1.0)


def test_a_model_without_anything_to_train_keeps_all_of_nothing() -> None:
    assert transfer(ADAM, IndexMap({}, {"w": size(2, 3)}, {}), min_coverage=1.0) == ({}, 1.0)


def test_modes_are_five() -> None:
    for mode in ("auto", "keep", "scale", "reset", "asymmetric"):
        transfer(ADAM, moved(Piece("w"), 2, 3), mode)
    with pytest.raises(
        ValueError, match="mode='Scale' is not allowed; use auto, keep, scale, reset, asymmetric"
    ):
        transfer(ADAM, moved(Piece("w"), 2, 3), "Scale")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("optimizer/w/exp_avg", W, ""),
        ("optimizer/a/b/exp_avg_sq", W, ""),
        ("optimizer/w/momentum_buffer", W, ""),
        ("optimizer/w/step", torch.tensor(3.0), ""),
        ("optimizer/w/step", torch.zeros(7), ""),
        (
            "model/w/exp_avg",
            W,
            "state 'model/w/exp_avg' belongs to no parameter of the model before the op; give it as optimizer/<parameter>/",
        ),
        ("optimizer/v/exp_avg", W, "state 'optimizer/v/exp_avg' belongs to no parameter"),
        ("optimizer/w/max_exp_avg_sq", W, "and exp_avg, exp_avg_sq, step or momentum_buffer"),
        ("optimizer/exp_avg", W, "state 'optimizer/exp_avg' belongs to no parameter"),
        (
            "optimizer/w/exp_avg",
            W.T,
            "state 'optimizer/w/exp_avg' has shape (3, 2); its parameter has (2, 3)",
        ),
        ("optimizer/w/momentum_buffer", W[0], "has shape (3,); its parameter has (2, 3)"),
    ],
)
def test_state_that_fits_no_parameter_is_refused(name: str, value: Tensor, said: str) -> None:
    old = {"w": size(2, 3), "a/b": size(2, 3)}
    if not said:
        held = by_parameter({name: value}, old)
        parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
        assert held == {parameter: {key: value}}
        return
    with pytest.raises(ValueError) as e:
        by_parameter({name: value}, old)
    assert said in str(e.value)
