"""Interrupted runs go on where they stopped, and only with the settings that they began with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.conversion.made import QUICK, Convert, digest
from tests.families import THETA, MakeSource
from transmla.conversion import calibration, fit
from transmla.conversion import distil as distilling
from transmla.conversion.levels import Descent
from transmla.errors import DestinationError
from transmla.maths.closed_form import ClosedForm


@pytest.mark.parametrize("stage", ["tokens", "choose theta"])
def test_a_run_that_was_interrupted_before_the_first_layer_leaves_nothing(
    lively: MakeSource, run: Convert, tmp_path: Path, stage: str
) -> None:
    def interrupt(at: str, done: int, total: int, remark: str) -> None:
        if at == stage and done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert run(lively()).destination.is_dir()


def test_an_interrupted_run_keeps_what_the_source_wrote(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not written again, since it need not be the same twice."""
    settings: dict[str, Any] = {"calibration": "self", "sampled": 64, "theta": THETA}
    expected = digest(run(lively(), "whole", **settings).destination)

    def interrupt(at: str, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, **settings)
    for name in ("sample_from", "continue_from"):
        monkeypatch.delattr(calibration, name)
    report = run(lively(), **settings)
    assert digest(report.destination) == expected
    assert json.loads((report.destination / "transmla.json").read_text())["calibration"]["text"].startswith("self+")
    with pytest.raises(NameError):
        run(lively(), "another", **settings)


def test_an_interrupted_run_goes_on(
    lively: MakeSource, run: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that were finished are not fitted again, and the result is that of an uninterrupted run, bit by bit."""
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "latent": 12, "rope": 8}
    whole = digest(run(lively(), "whole", **settings).destination)
    fitted, fit_one = [], fit._fit

    def counted(run: Any, layer: Any, *rest: Any) -> Any:
        fitted.append(layer.index)
        return fit_one(run, layer, *rest)

    monkeypatch.setattr(fit, "_fit", counted)
    for stage in ("convert layers", "distil"):

        def interrupt(at: str, done: int, total: int, remark: str, stage: str = stage) -> None:
            if at == stage and done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(lively(), progress=interrupt, **settings)
        assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]
        assert {path.name for path in (tmp_path / "out.partial").iterdir()} == {".transmla-partial", "journal"}
        fitted.clear()
        report = run(lively(), **settings)
        assert fitted == ([2] if stage == "convert layers" else [])
        assert digest(report.destination) == whole
        assert not (tmp_path / "out.partial").exists() and not (report.destination / "journal").exists()
        shutil.rmtree(report.destination)


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    # the last blocks of one and of two layers are the same layer
    [
        ("distil layers 2-2", 2, 3), ("distil", 3, 2), ("measure", 3, 2), ("measure", 2, 3), ("measure", 1, 2),
        ("measure", 2, 1), ("distil layers 2-2", 1, 2),
    ],
)  # fmt: skip
def test_blocks_of_another_size_are_not_mixed(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, stage: str, before: int, after: int
) -> None:
    """The size of a block depends on the memory that is free, and that may have changed since the interruption."""
    monkeypatch.setattr(distilling, "SAVE_EVERY", 0.0)
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    expected = digest(run(lively(), "whole", block_layers=after, **settings).destination)

    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == stage and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, block_layers=before, **settings)
    assert digest(run(lively(), block_layers=after, **settings).destination) == expected


def test_blocks_of_three_divisions_are_not_mixed(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of two layers, then one of three, then of two again: layer 3 is of a block whose layer 2 is gone."""
    monkeypatch.setattr(distilling, "SAVE_EVERY", 0.0)
    source = lively(layers=4)
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    expected = digest(run(source, "whole", block_layers=2, **settings).destination)

    def interrupted_at(stage: str) -> Callable[..., None]:
        def interrupt(at: str, done: int, *_: Any) -> None:
            if at == stage:
                raise KeyboardInterrupt

        return interrupt

    for stage, block_layers in (("measure", 2), ("distil layers 3-3", 3)):
        with pytest.raises(KeyboardInterrupt):
            run(source, progress=interrupted_at(stage), block_layers=block_layers, **settings)
    assert digest(run(source, block_layers=2, **settings).destination) == expected


@pytest.mark.parametrize(
    ("stage", "began", "fitting"), [("measure", 2, 1), ("measure", 2, 3), ("distil layers 1-1", 1, 3)]
)
def test_blocks_stay_as_they_began(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, stage: str, began: int, fitting: int
) -> None:
    """What is finished, or fits in smaller blocks, is not begun anew when other memory is free."""
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    expected = digest(run(lively(), "whole", block_layers=began, **settings).destination)

    def interrupt(at: str, *_: Any) -> None:
        if at == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(distilling, "layers_that_fit", lambda *_: began)
    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, **settings)
    monkeypatch.setattr(distilling, "layers_that_fit", lambda *_: fitting)
    seen: list[str] = []
    assert digest(run(lively(), progress=lambda at, *_: seen.append(at), **settings).destination) == expected
    trained = {at for at in seen if at.startswith("distil")}
    assert trained == (set() if stage == "measure" else {"distil layers 1-1", "distil layers 2-2"})


@pytest.mark.parametrize(("less", "again"), [(0.95, False), (0.5, True)])
def test_a_little_less_memory_is_no_reason_to_train_blocks_again(
    lively: MakeSource, run: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, less: float, again: bool
) -> None:
    """Half of what is free when a conversion begins; three quarters when it goes on: no two moments are alike."""
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    monkeypatch.setattr(distilling, "refined_bytes", lambda *_: (100, 0))
    monkeypatch.setattr(distilling, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(distilling, "free_bytes", lambda device: 400)

    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == "distil layers 2-2" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, **settings)
    monkeypatch.setattr(distilling, "free_bytes", lambda device: round(400 * less))
    seen: list[str] = []
    journals: list[set[str]] = []

    def watch(at: str, *_: Any) -> None:
        seen.append(at)
        if at.startswith("distil"):
            journals.append({file.name for file in tmp_path.rglob("*-state.safetensors")})

    report = run(lively(), progress=watch, **settings)
    assert [block.last_layer for block in report.blocks] == ([0, 1, 2] if again else [1, 2])
    assert ("distil layers 0-1" in seen, "distil layers 0-0" in seen) == (False, again)
    assert any("of-2" in name for names in journals for name in names) == (not again)


def test_distillation_goes_on_with_the_step_it_was_at(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilling, "SAVE_EVERY", 0.0)
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    expected = digest(run(lively(), "whole", **settings).destination)
    seen: list[int] = []

    def progress(at: str, done: int, *_: Any) -> None:
        if at == "distil":
            seen.append(done)
            if seen == [0, 1, 2, 3, 4]:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=progress, **settings)
    report = run(lively(), progress=progress, **settings)
    # step 4 had not been saved yet
    assert seen == [0, 1, 2, 3, 4, 3, *range(4, report.blocks[0].steps + 1)]
    assert digest(report.destination) == expected


def test_a_journal_of_other_settings_is_not_thrown_away(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, theta=THETA)
    with pytest.raises(DestinationError, match="differs in theta") as caught:
        run(lively(), theta=500.0)
    with pytest.raises(DestinationError, match="differs in context"):
        run(lively(), theta=THETA, context=1)
    with pytest.raises(DestinationError, match="differs in form"):
        run(lively(), theta=THETA, format="transmla")
    with pytest.raises(
        DestinationError, match=r"differs in seed \(0 then, 1 now\), tokens \(\[512, 0\] then, \[256, 0\] now\)"
    ):
        run(lively(), theta=THETA, seed=1, tokens=256)
    assert "--restart" in str(caught.value) and (tmp_path / "out.partial" / "journal" / "settings.json").is_file()
    assert run(lively(), theta=500.0, restart=True).theta == 500.0


def test_a_config_that_has_changed_is_another_setting(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(lively(), source)

    def interrupt(at: str, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, progress=interrupt, theta=THETA)
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}), encoding="utf-8")
    with pytest.raises(DestinationError, match="differs in config"):
        run(source, theta=THETA)


def test_a_text_that_has_changed_is_another_setting(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    """Of two texts of one name, too."""
    paths = [tmp_path / folder / "text.txt" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("Once there was a dog. " * 400, encoding="utf-8")
    settings = {"calibration": "+".join(map(str, paths)), "theta": THETA}

    def interrupt(at: str, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, **settings)
    paths[0].write_text("Once there was a cat. And then? " * 300, encoding="utf-8")
    with pytest.raises(DestinationError, match="differs in texts"):
        run(lively(), **settings)


def test_layers_that_were_fitted_to_some_windows_go_on(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of eight windows, one of them held out; the others only pass through the source."""
    monkeypatch.setattr("transmla.conversion.levels.LEAST_PER_FEATURE", 1)
    refinement = replace(QUICK, closed_form_tokens=128)
    settings: dict[str, Any] = {"refine": "fast", "refinement": refinement, "latent": 12, "rope": 8, "theta": THETA}
    whole = run(lively(), "whole", **settings)

    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == "convert layers" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, **settings)
    again = run(lively(), **settings)
    assert again.layers == whole.layers and digest(again.destination) == digest(whole.destination)


def test_what_a_journal_was_made_with(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    """Everything that a finished step depends on is a setting of it."""
    source = Path(shutil.copytree(lively(), tmp_path / "source"))
    settings: dict[str, Any] = {"theta": THETA, "refine": "fast", "refinement": QUICK}

    def interrupt(at: str, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, progress=interrupt, **settings)
    others: dict[str, dict[str, Any]] = {
        "window": {"window": 32},
        "begin": {"begin": "all"},
        "calibration": {"calibration": "stories"},
        "method.key_weight": {"method": ClosedForm(key_weight=1.0)},
        "refinement.distil.rate": {"refinement": replace(QUICK, distil=Descent(2.0, 2, 2e-2))},
    }
    for name, changed in others.items():
        with pytest.raises(DestinationError, match=f"differs in .*{name}"):
            run(source, **settings | changed)
    for name, file in (("tokenizer", "tokenizer.json"), ("files", "model.safetensors")):
        before = (source / file).read_bytes()
        if name == "tokenizer":
            (source / file).write_bytes(before + b"\n")
        else:
            save_file(load_file(source / file), source / file, metadata={"format": "pt", "of": "another day"})
        with pytest.raises(DestinationError, match=f"differs in {name}"):
            run(source, **settings)
        (source / file).write_bytes(before)
