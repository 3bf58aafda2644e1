"""Two streams through a layer: what each step adds, and that the repair repairs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conversion.pieces import model_and_layer, random_streams
from tests.maths.weights import fit_layer, relative
from transmla.conversion.moments import observe
from transmla.conversion.streams import (
    Repair,
    Streams,
    advance_converted,
    advance_source,
    converted_heads,
    next_token_losses,
    stream_loss,
)
from transmla.maths.attention import MlaWeights
from transmla.maths.closed_form import ClosedForm
from transmla.maths.reference import gqa_naive, mla_naive
from transmla.model.layer import SourceLayer
from transmla.processes import Processes


@pytest.fixture(scope="module")
def layer() -> SourceLayer:
    return model_and_layer(heads=4, head_dim=16)[1]


@pytest.fixture
def streams() -> Streams:
    return random_streams(windows=30, tokens=16, heldout=10, gap=40)


def fitted(layer: SourceLayer, streams: Streams, rank: int) -> MlaWeights:
    moments = observe(layer, streams, 16)
    return fit_layer(layer.gqa.to(dtype=torch.float64), moments, rank, 4, 10000.0, ClosedForm()).mla


def test_both_streams_behind_a_layer(layer: SourceLayer, device: torch.device) -> None:
    streams = random_streams(windows=30, tokens=16, heldout=10, gap=40, device=device)
    here, layer = layer, model_and_layer(device=device, heads=4, head_dim=16)[1]
    source_TD, converted_TD = streams.source_NTD[2].clone(), streams.converted_NTD[2].clone()
    mla = fitted(layer, streams, 12)
    advance_source(layer, streams)
    gqa, positions = here.gqa.to(dtype=torch.float64), streams.positions_NT[2].tolist()
    out_TD = gqa_naive(here.into_attention(source_TD).double(), gqa, positions).float()
    assert relative(streams.source_NTD[2], here.past_attention(source_TD, out_TD)) < 1e-5
    heads = converted_heads(layer, mla, streams)
    advance_converted(layer, mla, heads, streams)
    mla, x_hat_TD = mla.to(device="cpu"), here.into_attention(converted_TD).double()
    for at, wrong in ((positions, False), (None, True)):
        out_TD = mla_naive(x_hat_TD, mla, at).float()
        error = relative(streams.converted_NTD[2], here.past_attention(converted_TD, out_TD))
        assert (error > 1e-3) if wrong else (error < 1e-5)


def repaired(layer: SourceLayer, mla: MlaWeights, heads_NTF: torch.Tensor, streams: Streams, *ridges: float) -> Any:
    """The weights with each ridge; the source's stream ends behind the layer."""
    repair = Repair(layer, mla, heads_NTF, streams)
    advance_source(layer, streams, repair.see)
    return [repair.fitted((ridge,))[0] for ridge in ridges]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "granite", "gemma3_text"])
@pytest.mark.parametrize("rank", [4, 12])
def test_repair_lowers_the_fitted_loss(model_type: str, rank: int) -> None:
    """Also with a bias, with residuals that are multiplied and with a norm behind the attention."""
    sizes: dict[str, Any] = {"heads": 4, "head_dim": 16, "model_type": model_type}
    _, layer = model_and_layer(**sizes)
    streams = random_streams(windows=30, tokens=16, heldout=10, gap=40)
    mla = layer.complete(fitted(layer, streams, rank))
    heads_NTF = converted_heads(layer, mla, streams)
    trials = repaired(layer, mla, heads_NTF, streams, 1e9, 1.0, 1e-2, 1e-4)
    losses = []
    for trial in (mla, *trials):
        behind = replace(streams, converted_NTD=streams.converted_NTD.clone())
        advance_converted(layer, trial, heads_NTF, behind)
        losses.append(stream_loss(behind).fitted)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[-1] < 0.98 * losses[0] and losses[-2] < losses[0]
    assert (trials[0].o_bias_D is not None) == (model_type == "qwen2")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "granite", "gemma3_text"])
def test_a_repair_is_the_weighted_ridge_regression(model_type: str) -> None:
    """Of all fitted windows, also of those that the ridge was chosen on: one token at a time, in float64."""
    _, layer = model_and_layer(heads=4, head_dim=16, model_type=model_type)
    streams = random_streams(windows=14, tokens=16, heldout=2)
    mla = layer.complete(fitted(layer, streams, 12))
    heads_NTF, before_NTD = converted_heads(layer, mla, streams), streams.source_NTD.clone()
    (found,) = repaired(layer, mla, heads_NTF, streams, 0.1)
    old_DF, norm = mla.o_DHv.double(), layer.output_norm
    if mla.o_bias_D is not None:
        heads_NTF = torch.cat([heads_NTF, torch.ones(14, 16, 1)], -1)
        old_DF = torch.cat([old_DF, mla.o_bias_D.double()[:, None]], 1)
    gram_FF, wanted_FD = torch.zeros(2 * (old_DF.shape[1],)).double(), torch.zeros(old_DF.T.shape).double()
    for window in range(12):
        out_TD = layer.attention(layer.into_attention(before_NTD[window]), streams.positions_NT[window])
        for token in range(16):
            f_F, out_D, stream_D = heads_NTF[window, token].double(), out_TD[token].double(), before_NTD[window, token]
            missing_D = (stream_D - streams.converted_NTD[window, token]).double()
            if norm is None:
                wanted_D = out_D + missing_D / layer.residual_multiplier
                weight = 1 / (stream_D + layer.residual_multiplier * out_D).square().mean()
            else:
                gain_D, size = norm(torch.ones(48)).double(), out_D.square().mean()
                wanted_D = out_D + missing_D * gain_D / (gain_D**2 + 0.01 * (gain_D**2).mean()) * size.sqrt()
                weight = 1 / (size * (stream_D + norm(out_TD[token])).square().mean())
            gram_FF += weight * torch.outer(f_F, f_F)
            wanted_FD += weight * torch.outer(f_F, wanted_D)
    held_FF = gram_FF + 0.1 * gram_FF.diagonal().mean() * torch.eye(len(gram_FF))
    expected_DF = old_DF + torch.linalg.solve(held_FF, wanted_FD - gram_FF @ old_DF.T).T
    assert relative(expected_DF, old_DF) > 0.05
    assert relative(found.o_DHv, expected_DF[:, : found.o_DHv.shape[1]]) < 1e-4
    if mla.o_bias_D is not None:
        assert relative(found.o_bias_D, expected_DF[:, -1]) < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("zero", ["tokens", "o_proj", "v_proj"])
def test_a_repair_where_there_is_nothing(model_type: str, zero: str) -> None:
    """Layers without an effect, and tokens without an embedding, also where a norm stands behind the attention."""
    _, layer = model_and_layer(heads=4, head_dim=16, model_type=model_type)
    streams = random_streams(windows=10, tokens=16, heldout=2)
    streams.source_NTD[3, 0] = streams.converted_NTD[3, 0] = 0.0 if zero == "tokens" else 1.0
    mla = layer.complete(fitted(layer, streams, 12))
    if zero == "v_proj":
        mla = replace(mla, v_up_Hvr=torch.zeros_like(mla.v_up_Hvr))
    elif zero == "o_proj":
        layer.o_proj.weight.data.zero_()
        mla = replace(mla, o_DHv=torch.zeros_like(mla.o_DHv))
    heads_NTF = converted_heads(layer, mla, streams)
    found = repaired(layer, mla, heads_NTF, streams, 1e-2)[0]
    assert found.o_DHv.isfinite().all() and (zero != "v_proj" or relative(found.o_DHv, mla.o_DHv) < 1e-6)
    advance_converted(layer, found, heads_NTF, streams)
    assert zero == "v_proj" or stream_loss(streams).fitted < 1


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_repair_of_few_tokens_is_held_back(model_type: str) -> None:
    """With fewer tokens than features, the smallest ridge fits them alone; the chosen one does no harm to others."""
    _, layer = model_and_layer(heads=4, head_dim=16, model_type=model_type)
    streams = random_streams(windows=60, tokens=16, heldout=56)
    mla = layer.complete(fitted(layer, streams, 12))
    heads_NTF = converted_heads(layer, mla, streams)
    repair = Repair(layer, mla, heads_NTF, streams)
    advance_source(layer, streams, repair.see)
    assert 48 < mla.o_DHv.shape[1] == 64
    losses = {}
    for name, ridges in {"none": (1e9,), "smallest": (1e-6,), "chosen": (1e-6, 1e-4, 1e-2, 1.0, 100.0)}.items():
        trial, ridge = repair.fitted(ridges)
        behind = replace(streams, converted_NTD=streams.converted_NTD.clone())
        advance_converted(layer, trial, heads_NTF, behind)
        losses[name] = stream_loss(behind)
    assert ridge > 1e-6
    assert losses["smallest"].fitted < 0.9 * losses["none"].fitted
    assert losses["smallest"].heldout > 1.1 * losses["none"].heldout
    assert losses["chosen"].heldout < 1.02 * losses["none"].heldout


def test_several_windows_at_once(layer: SourceLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are tokens for, and never some that are held out or set aside with others."""
    found = []
    for tokens in (1, 112):
        monkeypatch.setattr("transmla.conversion.streams.TOKENS_ON_CPU", tokens)
        streams = random_streams(windows=30, tokens=16, heldout=10, gap=40)
        places = [places for places, _, _ in streams.batches()]
        assert (streams.num_aside, streams.first_aside) == (5, 15)
        if tokens > 1:
            starts = [(one.start, one.stop) for one in places]
            assert starts == [(0, 7), (7, 14), (14, 15), (15, 20), (20, 27), (27, 30)]
        mla = fitted(layer, streams, 12)
        heads_NTF = converted_heads(layer, mla, streams)
        repair = Repair(layer, mla, heads_NTF, streams)
        advance_source(layer, streams, repair.see)
        repaired_DHv = repair.fitted((1e-2,))[0].o_DHv
        advance_converted(layer, mla, heads_NTF, streams)
        found.append((repaired_DHv, streams.source_NTD, streams.converted_NTD))
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < 1e-4


def test_a_repair_of_the_last_windows(layer: SourceLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of all windows know nothing of what is set aside of the last ones, on which the ridge is chosen."""
    found = []
    ridges = (1e-6, 1e-4, 1e-2, 1.0, 100.0)
    for tokens in (1, 1000):
        monkeypatch.setattr("transmla.conversion.streams.TOKENS_ON_CPU", tokens)
        streams = random_streams(windows=30, tokens=16, heldout=10, gap=40)
        closed = streams.last(14)
        assert (closed.num_fitted, closed.first_aside, streams.first_aside) == (4, 3, 15)
        mla = fitted(layer, closed, 12)
        repair = Repair(layer, mla, converted_heads(layer, mla, closed), closed)

        def see(places: slice, *rest: torch.Tensor, repair: Repair = repair) -> None:
            repair.see(slice(places.start - 16, places.stop - 16), *rest)

        advance_source(layer, streams, see)
        weights, ridge = repair.fitted(ridges)
        found.append((weights.o_DHv, ridge))
        assert all(float(gram.diagonal().sum()) > 0 for gram in repair._grams)
    (one, first), (other, second) = found
    assert first == second > ridges[0] and relative(one, other) < 1e-4


def test_repair_never_sees_held_out_windows(layer: SourceLayer, streams: Streams) -> None:
    mla = fitted(layer, streams, 12)
    heads_NTF = converted_heads(layer, mla, streams)

    def found() -> torch.Tensor:
        behind = replace(streams, source_NTD=streams.source_NTD.clone())
        o_DF: torch.Tensor = repaired(layer, mla, heads_NTF, behind, 1e-2)[0].o_DHv
        return o_DF

    before = found()
    streams.source_NTD[20:], streams.converted_NTD[20:], heads_NTF[20:] = 5.0, -5.0, 3.0
    assert torch.equal(before, found())
    streams.source_NTD[19] = 5.0
    assert not torch.equal(before, found())


def test_stream_loss_counts_every_token_by_its_own_size() -> None:
    streams = random_streams(windows=3, heldout=1)
    streams.converted_NTD = streams.source_NTD.clone()
    streams.converted_NTD[:2] *= 0.9
    streams.converted_NTD[2] *= 0.5
    # one huge token changes nothing as long as its relative error is the same
    streams.source_NTD[0, 0] *= 1000
    streams.converted_NTD[0, 0] *= 1000
    loss = stream_loss(streams)
    assert loss.fitted == pytest.approx(0.01, rel=1e-4) and loss.heldout == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("rows", [2, 256])
def test_next_token_losses_of_held_out_windows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, and in pieces of which the last is smaller."""
    monkeypatch.setattr("transmla.conversion.streams.ROWS_OF_LOGITS", rows)
    streams = random_streams(windows=5, tokens=6, hidden=8, heldout=2)
    head_VD = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    tokens_NT = torch.randint(20, (5, 6), generator=torch.Generator().manual_seed(2))
    source_N, converted_N = next_token_losses(streams, tokens_NT, lambda stream_TD: stream_TD @ head_VD.T)
    log_p_TV = (streams.source_NTD[4] @ head_VD.T).log_softmax(-1)
    nats = [-float(log_p_TV[t, tokens_NT[4, t + 1]]) for t in range(5)]
    assert len(source_N) == 2 and float(source_N[1]) == pytest.approx(sum(nats) / 5, rel=1e-5)
    assert not torch.allclose(source_N, converted_N)


def test_positions_are_those_of_the_windows(streams: Streams) -> None:
    last = streams.last(5)
    assert torch.equal(last.positions_NT, streams.positions_NT[-5:])
    assert torch.equal(last.positions([0, 3]), streams.positions_NT[[25, 28]])
    with pytest.raises(ValueError, match="positions"):
        replace(streams, positions_NT=streams.positions_NT[1:])


def test_the_last_windows_are_the_same_memory(streams: Streams) -> None:
    last = streams.last(12)
    assert (last.num_windows, last.num_fitted, last.num_heldout) == (12, 2, 10)
    assert last.indices == list(range(12)) and torch.equal(last.source_NTD, streams.source_NTD[18:])
    last.converted_NTD[0] = 7.0
    assert torch.equal(streams.converted_NTD[18], last.converted_NTD[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_of_the_last_windows_a_process_may_hold_none(streams: Streams, rank: int) -> None:
    """Thirty windows in two processes: the very last one is window 29, of process 1."""
    mine = streams.source_NTD[rank::2]
    held = Streams(mine, mine.clone(), 10, streams.device, None, Processes(rank, 2), 30)
    assert held.indices == list(range(rank, 30, 2)) and held.num_fitted == 10
    last = held.last(1)
    assert last.indices == ([0] if rank == 1 else []) and len(last.source_NTD) == rank
