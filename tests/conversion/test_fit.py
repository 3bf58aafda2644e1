"""One layer through the closed form as a conversion takes it: on the last windows, while the others only pass."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conversion.pieces import CPU, model_and_layer, random_streams
from tests.maths.weights import mla_weights, relative
from transmla.conversion import fit
from transmla.conversion.fit import _agreed, _fit, num_closed
from transmla.conversion.levels import LEVELS
from transmla.conversion.moments import observe
from transmla.conversion.streams import Streams, advance_source
from transmla.geometry import mla_geometry
from transmla.maths.closed_form import ClosedForm
from transmla.model.layer import SourceLayer
from transmla.processes import ALONE
from transmla.recipe import Recipe


def fitted(layer: SourceLayer, streams: Streams, closed: Streams) -> Any:
    method = ClosedForm(stream_ridge=0.5, output_ridge=0.25, ridge_steps=(1.0,))
    planned = SimpleNamespace(mla=mla_geometry(layer.geometry, 12, 4), recipe=Recipe())
    run: Any = SimpleNamespace(plan=planned, method=method, processes=ALONE, device=CPU)
    return _fit(run, layer, streams, closed, 10000.0)


def test_a_layer_is_fitted_to_the_last_windows_as_if_there_were_no_others() -> None:
    _, layer = model_and_layer(heads=4, head_dim=16)
    streams = random_streams(windows=30, tokens=16, heldout=10, gap=40)
    passed = replace(streams, source_NTD=streams.source_NTD.clone())
    advance_source(layer, passed)
    before_NTD, closed = streams.converted_NTD.clone(), streams.last(14)
    alone = replace(closed, source_NTD=closed.source_NTD.clone(), converted_NTD=closed.converted_NTD.clone())
    (mla, report), (wanted, of_alone) = fitted(layer, streams, closed), fitted(layer, alone, alone)
    assert relative(mla.o_DHv, wanted.o_DHv) < 1e-5 and relative(mla.o_DHv, layer.gqa.o_DHd) > 0.01
    assert report.query_loss is of_alone.query_loss is None
    for name, value in vars(replace(of_alone, query_loss=0.0)).items():
        assert vars(replace(report, query_loss=0.0))[name] == pytest.approx(value, rel=1e-4), name
    assert relative(streams.converted_NTD[16:], alone.converted_NTD) < 1e-5
    assert torch.equal(streams.converted_NTD[:16], before_NTD[:16])
    assert relative(streams.source_NTD, passed.source_NTD) < 1e-5
    assert (report.stream_ridge, report.output_ridge) == (0.5, 0.25)


def test_a_wide_layer_sees_more_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 tokens for each feature, and 8 of them with their attention."""
    _, layer = model_and_layer(heads=4, head_dim=16)
    asked: list[int] = []

    def watched(layer: SourceLayer, streams: Streams, num_attended: int) -> Any:
        asked.append(num_attended)
        return observe(layer, streams, num_attended)

    monkeypatch.setattr(fit, "observe", watched)
    streams = random_streams(tokens=16)
    fitted(layer, streams, streams)
    assert asked == [8 * 64 / 16]
    run: Any = SimpleNamespace(refinement=LEVELS["fast"], plan=SimpleNamespace(mla=SimpleNamespace(widest=4096)))
    many: Any = SimpleNamespace(num_windows=400, num_heldout=4, source_NTD=torch.empty(0, 1024, 1))
    assert num_closed(run, many) == 132


def test_all_processes_go_on_with_the_weights_of_the_first() -> None:
    first = mla_weights(seed=1)
    run: Any = SimpleNamespace(processes=SimpleNamespace(size=2, from_first=lambda _: first), device=CPU)
    assert torch.equal(_agreed(mla_weights(), run).o_DHv, first.o_DHv)
