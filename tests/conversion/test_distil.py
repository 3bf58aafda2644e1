"""Which windows a block is trained on, and what is kept of its losses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from transmla.conversion import distil as distilling
from transmla.conversion.distil import layers_that_fit, num_trained_on, stretches
from transmla.conversion.fit import num_attended
from transmla.conversion.levels import LEVELS, Descent, Refinement
from transmla.conversion.plan import plan


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([], []),
        ([3.0], [3.0]),
        ([4.0, 2.0], [4.0, 2.0]),
        ([8.0, 6.0, 4.0, 2.0], [7.0, 3.0]),
        ([5.0, 4.0, 2.0], [5.0, 3.0]),
    ],
)
def test_stretches(losses: list[float], found: list[float]) -> None:
    """At most two: the later ones take what does not divide."""
    assert stretches(losses, 2) == found


def test_every_step_counts_once() -> None:
    means = stretches([float(step) for step in range(100)], 32)
    assert len(means) == 32 and means == sorted(means)
    assert stretches([1.0] * 100, 32) == [1.0] * 32


@pytest.mark.parametrize(
    ("closed_form_tokens", "distil_unseen", "found"),
    # twenty windows of ten tokens, two of them held out
    [
        (40, True, 14),
        (60, True, 12),
        (70, True, 14),
        (90, True, 18),
        (60, False, 18),
        (None, True, 18),
        (1000, True, 18),
    ],
)
def test_windows_that_the_closed_form_has_not_seen(
    closed_form_tokens: int | None, distil_unseen: bool, found: int
) -> None:
    """They come first, and they are enough if they are twice those that it has seen, or else as many as that."""
    refinement = Refinement(Descent(1.0, 1, 1e-3), closed_form_tokens, distil_unseen)
    streams: Any = SimpleNamespace(
        num_windows=20, num_heldout=2, num_fitted_of_all=18, source_NTD=torch.empty(20, 10, 1)
    )
    run: Any = SimpleNamespace(refinement=refinement, plan=SimpleNamespace(mla=SimpleNamespace(widest=1)))
    assert num_trained_on(run, streams) == found


def test_more_text_is_never_less_training() -> None:
    refinement = Refinement(Descent(1.0, 1, 1e-3), 80, True)
    run: Any = SimpleNamespace(refinement=refinement, plan=SimpleNamespace(mla=SimpleNamespace(widest=1)))
    counts = []
    for windows in range(3, 60):
        streams = SimpleNamespace(
            num_windows=windows, num_heldout=2, num_fitted_of_all=windows - 2, source_NTD=torch.empty(windows, 10, 1)
        )
        counts.append(num_trained_on(run, streams))  # type: ignore[arg-type]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 49


def test_layers_that_fit_count_the_windows_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not more than go forward at once, and not those that a step does not have; rounded latents lie beside exact
    ones."""
    monkeypatch.setattr(distilling, "free_bytes", lambda device: 2**27)
    streams: Any = SimpleNamespace(source_NTD=torch.empty(2, 64, 1))

    def found(batch: int, **settings: Any) -> int:
        refinement = Refinement(Descent(1.0, batch, 1e-3))
        run: Any = SimpleNamespace(
            plan=plan("stories260k", **settings), refinement=refinement, device=torch.device("cpu"),
            compute=torch.float32,
        )  # fmt: skip
        return layers_that_fit(run, streams)

    assert found(1) > 2 * found(8) > 2 * found(32) > 0
    assert found(32) == found(64), "2,048 tokens are the most at once"
    assert 2 * found(1, latent_bits=2) > found(1) > 1.1 * found(1, latent_bits=2)


@pytest.mark.parametrize(("free", "found"), [(2000, 7), (2199, 7), (2200, 8), (700, 1), (0, 1)])
def test_layers_behind_which_a_head_fits_into_half_of_the_memory(
    free: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is tried however little there is."""
    monkeypatch.setattr(distilling, "free_bytes", lambda device: free)
    monkeypatch.setattr(distilling, "refined_bytes", lambda *_: (100, 300))
    run: Any = SimpleNamespace(
        plan=plan("stories260k"), refinement=LEVELS["fast"], device=torch.device("cpu"), compute=torch.float32
    )
    assert layers_that_fit(run, SimpleNamespace(source_NTD=torch.empty(2, 64, 1))) == found  # type: ignore[arg-type]


def test_blocks_fit_into_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of different sizes: the smallest decides, whichever process has it."""
    monkeypatch.setattr(distilling, "layers_that_fit", lambda *_: 6)
    saved: list[dict[str, int]] = []

    def division(others: dict[int, int]) -> int:
        gathered = {rank: (size, size + 1) for rank, size in others.items()}
        processes = SimpleNamespace(rank=0, gather=lambda mine: mine | gathered, from_first=lambda value: value)
        kept = SimpleNamespace(
            values=lambda name: None, save=lambda name, values: saved.append(values), drop=lambda name: None
        )
        run: Any = SimpleNamespace(
            plan=SimpleNamespace(mla=SimpleNamespace(num_hidden_layers=8)), processes=processes, kept=kept,
            block_layers=None,
        )  # fmt: skip
        return distilling._layers_at_once(run, SimpleNamespace())  # type: ignore[arg-type]

    assert [division({}), division({1: 3, 2: 7}), division({1: 9})] == [6, 3, 6]
    assert saved == [{"at_once": size} for size in (6, 3, 6)]


def test_a_wide_model_needs_more_windows() -> None:
    """32 tokens for each feature of a regression, of those that there are."""
    fast = LEVELS["fast"]
    assert [fast.num_closed(400, 4, 1024, width) for width in (576, 2048, 4096, 16384)] == [52, 68, 132, 400]
    assert [num_attended(width, 1024) for width in (576, 4096)] == [16, 32]
