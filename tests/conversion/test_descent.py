"""Adam on attention weights: batches, rates, saved states."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.maths.weights import mla_weights
from transmla.conversion.descent import Descender, _annealed, _batches, leaves, trainable
from transmla.conversion.levels import Descent
from transmla.processes import ALONE

CPU = torch.device("cpu")


def descender(device: torch.device = CPU, **changes: Any) -> tuple[Descender, list[Any]]:
    weights = [trainable(mla_weights(seed=seed), device) for seed in (0, 20)]
    settings = {"passes": 2.0, "batch": 2, "rate": 1e-2} | changes
    return Descender(weights, Descent(**settings), 6, ALONE), weights


def pull(weights: list[Any]) -> Any:
    """Towards a multiple of the window's index: a loss that every leaf has a share in."""

    def loss_of(places: list[int]) -> torch.Tensor:
        terms = [(leaf - 0.1 * place).square().mean() for place in places for leaf in leaves(weights)]
        return torch.stack(terms).sum()

    return loss_of


def run(made: tuple[Descender, list[Any]], steps: int | None = None) -> list[float]:
    found = []
    for loss in made[0].steps(pull(made[1]), {index: index for index in range(6)}, at_once=1):
        found.append(loss)
        if len(found) == steps:
            break
    return found


def test_it_descends(device: torch.device) -> None:
    losses = run(descender(device, passes=20, rate=3e-2))
    assert len(losses) == 60 and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("windows", "steps"),
    [(1, 4), (100, 200), (400, 470), (900, 470), (2000, 1000)],
)
def test_much_text_is_not_repeated(windows: int, steps: int) -> None:
    """Little text comes again as often as `passes` allows, much text once, and what is between makes the same steps."""
    assert Descent(passes=4.0, batch=2, rate=1e-3, windows=940).num_steps(windows) == steps


def test_every_matrix_moves_by_its_own_size() -> None:
    """A step is `rate` of the matrix's root mean square, whatever the size of its gradient."""
    made, weights = descender(passes=1 / 3)
    before = [leaf.detach().clone() for leaf in leaves(weights)]
    run((made, weights))
    for old, new in zip(before, leaves(weights), strict=True):
        size = float((new.detach() - old).square().mean().sqrt() / old.square().mean().sqrt())
        assert size == pytest.approx(1e-2, rel=1e-3)


def test_at_once_and_one_by_one_are_the_same_steps() -> None:
    one, two = descender(), descender()
    run(one)
    list(two[0].steps(pull(two[1]), {index: index for index in range(6)}, at_once=2))
    for first, second in zip(leaves(one[1]), leaves(two[1]), strict=True):
        assert torch.allclose(first, second, atol=1e-7)


def test_a_window_counts_alike_whoever_holds_it() -> None:
    """A process that holds one window of a step of two has half of its mean loss."""
    made, weights = descender()
    mine = _batches(6, 2, made.num_steps)[0][0]
    expected = float(pull(weights)([mine]).detach()) / 2
    assert next(made.steps(pull(weights), {mine: mine}, at_once=2)) == pytest.approx(expected)


def test_a_restored_state_goes_on_as_if_nothing_had_been(device: torch.device) -> None:
    whole, first, second = descender(device), descender(device), descender(device)
    losses = run(whole)
    assert run(first, 3) == losses[:3]
    tensors, values = first[0].state()
    second[0].restore({name: tensor.detach().clone() for name, tensor in tensors.items()}, values)
    assert run(second) == losses[3:]
    assert second[0].losses == whole[0].losses == losses
    assert all(torch.equal(a, b) for a, b in zip(leaves(whole[1]), leaves(second[1]), strict=True))


def test_batches_are_balanced_shuffled_and_complete() -> None:
    batches = _batches(12, 4, 6)
    assert all(sorted(index % 4 for index in batch) == [0, 1, 2, 3] for batch in batches)
    for start in (0, 3):  # two passes
        assert sorted(index for batch in batches[start : start + 3] for index in batch) == list(range(12))
    assert batches[:3] != batches[3:], "another order in each pass"
    assert batches == _batches(12, 4, 6)


@pytest.mark.parametrize(("num_windows", "batch"), [(7, 2), (3, 3), (1, 1)])
def test_windows_that_fill_no_batch_take_turns(num_windows: int, batch: int) -> None:
    seen = {index for step in _batches(num_windows, batch, 40) for index in step}
    assert seen == set(range(num_windows))


def test_rates_warm_up_and_come_down_to_nothing() -> None:
    rates = [_annealed(step, 50) for step in range(50)]
    assert rates[0] < 0.25 and max(rates) > 0.9 and rates[-1] < 0.01
    assert rates.index(max(rates)) < 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_loss_or_a_gradient_that_is_not_finite_is_the_end(bad: float | None) -> None:
    """The weights stay as they were before it, and the curve holds numbers only."""
    made, weights = descender()
    pulled = pull(weights)

    def loss_of(places: list[int]) -> torch.Tensor:
        loss: torch.Tensor = pulled(places)
        if made.done != 2:
            return loss
        # of a square root at nothing, the value is finite and the slope is not
        return loss + (weights[0].o_DHv * 0).sqrt().sum() if bad is None else loss * bad

    found = list(made.steps(loss_of, {index: index for index in range(6)}, at_once=1))
    assert len(found) == made.done == len(made.losses) == 2 < made.num_steps
    whole = descender()
    assert run(whole, 2) == found
    for left, expected in zip(leaves(weights), leaves(whole[1]), strict=True):
        assert left.isfinite().all() and torch.equal(left, expected)


@pytest.mark.parametrize("q_rank", [None, 7])
def test_matrices_are_trained_and_biases_and_norms_are_not(q_rank: int | None) -> None:
    biases = {"q_nope_bias_Hn": (4, 8), "q_rope_bias_He": (4, 6), "k_rope_bias_e": (6,), "o_bias_D": (24,)}
    mla = replace(mla_weights(q_rank=q_rank), **{name: torch.ones(size) for name, size in biases.items()})
    matrices = {name for name, value in vars(mla).items() if isinstance(value, torch.Tensor)} - {"inv_freq_M", *biases}

    def found(weights: Any) -> set[str]:
        named = vars(weights) | (weights.encoder or {})
        return {name for name, value in named.items() if getattr(value, "requires_grad", False)}

    assert found(trainable(mla, CPU)) == matrices and len(leaves([mla])) == len(matrices) == 7 + bool(q_rank)
    # behind an encoder, the queries are the identity
    encoder = {"q_proj.weight": torch.ones(32, 24), "q_norm.weight": torch.ones(8)}
    encoded = trainable(replace(mla, encoder=encoder), CPU)
    assert found(encoded) == matrices - {"q_nope_HnD"} | {"q_proj.weight"}
