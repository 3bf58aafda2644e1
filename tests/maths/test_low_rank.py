"""One latent for keys and values: the loss is the dropped energy, and nothing of the same rank is better."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.maths.weights import inputs, lively, relative
from transmla.maths.low_rank import Block, decode, joint_low_rank, symmetric_power, top_encoder

SAMPLES_ND = inputs(400, 14)
MOMENT_DD = SAMPLES_ND.T @ SAMPLES_ND / len(SAMPLES_ND)
OTHER_DD = torch.diag(torch.linspace(0.1, 3, 14, dtype=torch.float64))


def metric(size: int, seed: int) -> Tensor:
    root = lively(size, size, seed=seed)
    return root @ root.T


def blocks(second_moment: Tensor = MOMENT_DD) -> tuple[Block, Block]:
    keys = Block(lively(8, 14, seed=1), metric(8, 2), MOMENT_DD)
    return keys, Block(lively(6, 14, seed=3), metric(6, 4), second_moment)


def lost_on_samples(encoder_rD: Tensor, decoders: tuple[Tensor, ...]) -> float:
    """Weighted squared error of all samples over their weighted energy, one sample at a time."""
    lost = energy = 0.0
    for x_D in SAMPLES_ND:
        for block, decoder in zip(blocks(), decoders, strict=True):
            exact = block.target_kD @ x_D
            error = exact - decoder @ (encoder_rD @ x_D)
            lost += float(error @ block.metric_kk @ error)
            energy += float(exact @ block.metric_kk @ exact)
    return lost / energy


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_loss_is_the_dropped_energy(rank: int, device: torch.device) -> None:
    weighted = torch.cat([symmetric_power(block.metric_kk, 0.5) @ block.target_kD for block in blocks()])
    energies = torch.linalg.svdvals(weighted @ symmetric_power(MOMENT_DD, 0.5)).square()
    there = (Block(*(tensor.to(device) for tensor in vars(block).values())) for block in blocks())
    found = joint_low_rank(*there, rank)
    assert abs(found.loss - float(energies[rank:].sum() / energies.sum())) < 1e-8
    decoders = tuple(decoder.cpu() for decoder in found.decoders)
    assert abs(found.loss - lost_on_samples(found.encoder_rD.cpu(), decoders)) < 1e-8


def test_more_rows_and_ranks_than_256() -> None:
    """Ranks above 256 lose what they drop, and as many as there are dimensions lose nothing."""
    moment_DD = inputs(1000, 512).T @ inputs(1000, 512) / 1000
    keys = Block(lively(320, 512, seed=1), torch.eye(320, dtype=torch.float64), moment_DD)
    values = Block(lively(320, 512, seed=3), torch.eye(320, dtype=torch.float64), moment_DD)
    weighted = torch.cat([keys.target_kD, values.target_kD]) @ symmetric_power(moment_DD, 0.5)
    energies = torch.linalg.svdvals(weighted).square()
    for rank in (288, 384):
        found = joint_low_rank(keys, values, rank)
        assert found.encoder_rD.shape == (rank, 512)
        assert found.loss == pytest.approx(float(energies[rank:].sum() / energies.sum()), rel=1e-6)
    assert joint_low_rank(keys, values, 512).loss < 1e-12


def test_no_other_encoder_of_that_rank_is_better() -> None:
    found = joint_low_rank(*blocks(), 5)
    for seed in range(20):
        nearby = found.encoder_rD + 10.0 ** -(seed % 4) * lively(5, 14, seed=50 + seed)
        decoders = tuple(decode(block.target_kD, MOMENT_DD, nearby) for block in blocks())
        assert lost_on_samples(nearby, decoders) > found.loss


def test_decode_is_best_for_its_encoder() -> None:
    encoder = lively(5, 14, seed=7)
    decoders = tuple(decode(block.target_kD, MOMENT_DD, encoder) for block in blocks())
    best = lost_on_samples(encoder, decoders)
    other = tuple(decoder + 0.01 * lively(*decoder.shape, seed=8) for decoder in decoders)
    assert lost_on_samples(encoder, other) > best


@pytest.mark.parametrize("rank", [1, 5, 14])
def test_both_ways_to_the_encoder_span_the_same_rows(rank: int) -> None:
    """Through the small gram of keys and values where the stream is wider than they are, else through the stream's."""
    root_kD, samples = lively(14, 40, seed=11), inputs(400, 40)
    moment_DD = samples.T @ samples / len(samples)
    small = top_encoder(root_kD, moment_DD, rank)
    # rows of nothing make the same problem one that is solved in the stream
    wide = top_encoder(torch.cat([root_kD, torch.zeros(40, 40)]), moment_DD, rank)

    def projector(encoder_rD: torch.Tensor) -> torch.Tensor:
        basis, _ = torch.linalg.qr(encoder_rD.T)
        return basis @ basis.T

    assert relative(projector(small), projector(wide)) < 1e-8
    _, _, right = torch.linalg.svd(root_kD @ symmetric_power(moment_DD, 0.5), full_matrices=False)
    assert relative(projector(right[:rank] @ symmetric_power(moment_DD, -0.5)), projector(small)) < 1e-8
    assert relative(projector(root_kD[:rank]), projector(small)) > 0.1 or rank == 14


def test_rank_beyond_what_the_rows_span_is_filled_with_rows_of_ordinary_size() -> None:
    root_kD = torch.cat([lively(3, 20, seed=12)] * 3)  # nine rows, three directions
    samples = inputs(100, 20)
    encoder = top_encoder(root_kD, samples.T @ samples / len(samples), 6)
    assert torch.linalg.matrix_rank(encoder) == 6
    rebuilt = encoder.T @ torch.linalg.lstsq(encoder.T, root_kD.T).solution
    assert relative(rebuilt.T, root_kD) < 1e-9


@pytest.mark.parametrize("rank", [5, 14])
def test_a_moment_that_rounding_has_left_indefinite(rank: int) -> None:
    """As of fewer tokens than dimensions, less the mean of them all."""
    samples = inputs(6, 14)
    moment_DD = samples.T @ samples / 6 - torch.outer(samples.mean(0), samples.mean(0))
    moment_DD = moment_DD - 1e-8 * moment_DD.diagonal().mean() * torch.eye(14, dtype=torch.float64)
    assert torch.linalg.eigvalsh(moment_DD)[0] < 0
    keys, values = blocks()
    found = joint_low_rank(replace(keys, moment_DD=moment_DD), replace(values, moment_DD=moment_DD), rank)
    assert found.encoder_rD.isfinite().all() and all(decoder.isfinite().all() for decoder in found.decoders)
    # five directions are all that these tokens have
    assert found.loss < 1e-6


def test_full_rank_loses_nothing() -> None:
    found = joint_low_rank(*blocks(OTHER_DD), 14)
    assert found.loss < 1e-12
    for block, decoder in zip(blocks(), found.decoders, strict=True):
        assert relative(decoder @ found.encoder_rD, block.target_kD) < 1e-7


def test_latent_has_unit_mean_square() -> None:
    encoder = joint_low_rank(*blocks(OTHER_DD), 4).encoder_rD
    mean_square = (encoder @ ((MOMENT_DD + OTHER_DD) / 2) * encoder).sum(1)
    assert (mean_square - 1).abs().max() < 1e-8


def test_a_block_that_does_not_matter_gets_no_rank() -> None:
    keys, values = blocks()
    found = joint_low_rank(Block(keys.target_kD, 0 * keys.metric_kk, MOMENT_DD), values, 6)
    assert relative(found.decoders[1] @ found.encoder_rD, values.target_kD) < 1e-7
    assert relative(found.decoders[0] @ found.encoder_rD, keys.target_kD) > 0.1


def test_symmetric_power() -> None:
    matrix = metric(6, seed=5)
    root, inverse = symmetric_power(matrix, 0.5), symmetric_power(matrix, -1.0)
    assert relative(root @ root, matrix) < 1e-12 and relative(root, root.T) < 1e-12
    assert relative(inverse @ matrix, torch.eye(6)) < 1e-9
    singular = torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64))
    assert symmetric_power(singular, -0.5, floor=1e-4)[1, 1] == pytest.approx((4e-4) ** -0.5)
