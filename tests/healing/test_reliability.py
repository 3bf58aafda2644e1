"""What healing takes of the disk, whom it stands in the way of, and what it goes on from."""

import contextlib
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerControl

import transmla
from tests.families import MakeSource
from transmla.checkpoint.destination import JOURNAL, lock_partial
from transmla.checkpoint.provenance import read_provenance
from transmla.errors import DataError, DestinationError, GateError, UnsupportedError, VerificationError
from transmla.healing.callbacks import Told
from transmla.healing.curves import healing_curve
from transmla.healing.flow import _has_no_step
from transmla.healing.needs import disk_bytes
from transmla.healing.prepare import packed_texts
from transmla.healing.train import Healer, Trained, distil, last_checkpoint, whole_tensors
from transmla.healing.weights import open_trainable
from transmla.healing.windows import Windows
from transmla.recipe import Healing

SETTINGS: dict[str, Any] = {
    "tokens": 3072, "window": 64, "batch": 2, "heldout": 2, "evaluations": 3, "rate": 3e-3, "precision": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(lively: MakeSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, its conversion and a text."""
    folder = tmp_path_factory.mktemp("reliable")
    # larger than its tokenizer, so that weights are what is counted
    shutil.copytree(lively(hidden=192), folder / "source")
    shutil.copy(text_file, folder / "text.txt")
    transmla.convert(
        str(folder / "source"), folder / "mla", latent=12, rope=4, refine="off", calibration=str(text_file),
        tokens=256, window=64, theta=100.0,
    )  # fmt: skip
    return folder


def heal(inputs: Path, out: Path, **others: Any) -> Any:
    settings = SETTINGS | {"data": str(inputs / "text.txt"), "source": str(inputs / "source")} | others
    return transmla.heal(inputs / "mla", out, **settings)


def interrupted(inputs: Path, out: Path) -> None:
    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == "heal" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(inputs, out, progress=interrupt)


def test_it_goes_on_where_there_are_other_instructions(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun in bfloat16 is resumed in float32, and the provenance says how it ended."""
    ran: list[bool] = []

    class Seen(Healer):
        def __init__(self, **given: Any) -> None:
            ran.append(given["args"].bf16)
            super().__init__(**given)

    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == "heal" and done == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr("transmla.healing.train.Healer", Seen)
    monkeypatch.setattr("transmla.healing.train.narrow_dtype", lambda device: torch.bfloat16)
    with pytest.raises(KeyboardInterrupt):
        heal(inputs, tmp_path / "out", progress=interrupt, precision="auto")
    monkeypatch.setattr("transmla.healing.train.narrow_dtype", lambda device: None)
    steps: list[int] = []
    heal(
        inputs,
        tmp_path / "out",
        precision="auto",
        progress=lambda at, done, *_: steps.append(done) if at == "heal" else None,
    )
    assert ran == [True, False] and min(steps) > 1
    assert read_provenance(tmp_path / "out")["healed"][0]["settings"]["precision"] == "float32"


def scored(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Let states have these scores: before training, and every four steps."""

    class Scored(Healer):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            found = super().evaluation_loop(*args, **kwargs)
            found.metrics["eval_score"] = scores[self.state.global_step // 4]
            return found

    monkeypatch.setattr("transmla.healing.train.Healer", Scored)


@pytest.mark.parametrize(
    ("scores", "others", "last"),
    [
        ((4.0, 3.0, 2.0, 1.0), {"distinct": 640}, 12),
        ((4.0, 2.0, 1.0, 3.0), {}, 12),
        ((4.0, 1.0, 2.0, 3.0), {"distinct": 640, "patience": 1}, 8),
    ],
)
def test_what_was_killed_behind_its_training_does_not_train_again(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: tuple[float, ...],
    others: dict[str, Any],
    last: int,
) -> None:
    """Whether the last state is the best one or not, within a pass or at its end; and in a moved folder."""
    scored(monkeypatch, *scores)
    results: list[Trained] = []
    steps: list[int] = []

    def kept(*args: Any) -> Trained:
        results.append(distil(*args))
        return results[-1]

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def told(at: str, number: int, *_: Any) -> None:
        if at == "heal":
            steps.append(number)

    monkeypatch.setattr("transmla.healing.flow.distil", kept)
    monkeypatch.setattr("transmla.healing.flow.write_healed", killed)
    for name in ("out", "out", "moved"):
        with pytest.raises(KeyboardInterrupt):
            heal(inputs, tmp_path / name, progress=told, tokens=1536, **others)
        assert steps == list(range(1, last + 1)), "not one more"
        if len(results) == 2:
            (tmp_path / "out.partial").rename(tmp_path / "moved.partial")
    first = results[0]
    assert first.best_step == 4 * scores.index(1.0)
    for again in results[1:]:
        assert (again.best_step, again.before, again.after) == (first.best_step, first.before, first.after)
        curves = [healing_curve(one.log, one.plan.tokens, list(one.before)) for one in (first, again)]
        assert curves[0] == curves[1] and first.tensors.keys() == again.tensors.keys()
        assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())


@pytest.mark.parametrize(("micro", "windows"), [(1, 10), (2, 7)])
def test_what_is_counted_is_trained(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int, windows: int
) -> None:
    """A pass over windows that repeat ends within a step, which has its full batch all the same; after a kill, too."""
    seen: list[list[int]] = []

    class Seen(Healer):
        def training_step(self, model: Any, inputs: dict[str, Any], *others: Any) -> torch.Tensor:
            while len(seen) <= self.state.global_step:
                seen.append([])
            seen[self.state.global_step] += inputs["index"].tolist()
            return super().training_step(model, inputs, *others)

    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == "heal" and done == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr("transmla.healing.train.Healer", Seen)
    # a rate at which so few of these random texts are learned wherever it runs
    others = {"tokens": 2560, "distinct": 64 * windows, "batch": 4, "micro": micro, "evaluations": 2, "rate": 1e-3}
    report = heal(inputs, tmp_path / "out", **others)
    whole, seen = seen, []
    assert [len(step) for step in whole] == [4] * 10 and report.tokens == 64 * sum(map(len, whole[: report.best_step]))
    counts = Counter(index for step in whole for index in step)
    assert counts.keys() == set(range(windows)) and max(counts.values()) - min(counts.values()) <= 1
    with pytest.raises(KeyboardInterrupt):
        heal(inputs, tmp_path / "killed", progress=interrupt, **others)
    assert seen == whole[:6]
    seen = []
    heal(inputs, tmp_path / "killed", **others)
    assert seen == [[]] * 5 + whole[5:]


@pytest.mark.parametrize(
    ("patience", "scores", "killed", "last"),
    [(2, (5.0, 4.0, 4.5, 3.5, 3.0), 5, 16), (3, (5.0, 4.0, 4.1, 4.2, 4.3, 4.4), 13, 16)],
)
def test_patience_survives_a_kill(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patience: int,
    scores: tuple[float, ...],
    killed: int,
    last: int,
) -> None:
    """The first evaluation of a resumed run is one that was counted, and so are those before it."""
    scored(monkeypatch, *scores)
    steps: list[int] = []

    def told(at: str, number: int, *_: Any) -> None:
        if at == "heal":
            steps.append(number)
            if number == killed and steps.count(killed) == 1:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"tokens": 4 * 128 * (len(scores) - 1), "evaluations": len(scores) - 1}
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            heal(inputs, tmp_path / "out", progress=told, patience=patience, **options)
    assert steps[killed - 1 : killed + 1] == [killed, killed] and steps[-1] == last


def test_restart_does_not_touch_a_heal_that_is_running(inputs: Path, tmp_path: Path) -> None:
    interrupted(inputs, tmp_path / "out")
    kept = tmp_path / "out.partial" / JOURNAL / "unfolded" / "model.safetensors"
    assert kept.is_file()
    lock = lock_partial(tmp_path / "out", resumes=True)  # as the other process holds it
    with pytest.raises(DestinationError, match="in use"):
        heal(inputs, tmp_path / "out", restart=True)
    assert kept.is_file()
    lock.close()


def test_it_does_not_go_on_from_another_parent(inputs: Path, tmp_path: Path) -> None:
    """Converted anew to the same folder: of the same name and size, and with the same time."""
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    interrupted(folder, tmp_path / "out")
    weights = folder / "mla" / "model.safetensors"
    stat = weights.stat()
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DestinationError, match=r"differs in files\.model\.safetensors"):
        heal(folder, tmp_path / "out")
    shutil.copy(inputs / "mla" / "model.safetensors", weights)  # of another time, and the same
    (folder / "text.txt").write_text("another text " * 500)
    with pytest.raises(DestinationError, match="differs in texts"):
        heal(folder, tmp_path / "out")
    shutil.copy(inputs / "text.txt", folder / "text.txt")
    assert heal(folder, tmp_path / "out").destination.is_dir()


@pytest.mark.parametrize("others", [{}, {"lora": 2}, {"train": "all"}])
def test_disk_is_foretold(inputs: Path, tmp_path: Path, others: dict[str, Any]) -> None:
    """More than is taken whenever progress is told, and no more than two copies and three checkpoints of what is
    trained, which are smaller where that is the attention alone."""
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        files = [path for path in tmp_path.rglob("*.*") if path.suffix in (".safetensors", ".pt", ".npy")]
        most = max(most, sum(path.stat().st_size for path in files))

    with contextlib.suppress(GateError):  # whether it helps is not the question here
        heal(inputs, tmp_path / "out", progress=look, **others)
    converted, settings = open_trainable(inputs / "mla"), Healing(**SETTINGS | others)
    foretold = disk_bytes(converted, settings) - 32 * 2**20
    whole = 4 * sum(math.prod(info.shape) for info in converted.tensors.values())
    assert 2 * whole < most <= foretold <= 12 * whole + 12 * settings.tokens, (most, foretold, whole)
    sharded = disk_bytes(converted, settings, sharded=True) - 32 * 2**20
    assert (foretold < sharded) is (settings.lora is None) and sharded <= 12 * whole + 12 * settings.tokens


@pytest.mark.parametrize("train", ["attention", "all"])
def test_checkpoints_hold_what_is_trained(
    inputs: Path, tmp_path: Path, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is missed when the best one is loaded."""
    found: list[set[str]] = []
    trained: set[str] = set()
    said: list[str] = []

    class Looking(Healer):
        def _load_best_model(self) -> None:
            best = Path(str(self.state.best_model_checkpoint))
            found.append(set(load_file(best / "model.safetensors")))
            trained.update(name for name, weight in self.model.named_parameters() if weight.requires_grad)
            super()._load_best_model()

    monkeypatch.setattr("transmla.healing.train.Healer", Looking)
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda message, *_: said.append(message))
    heal(inputs, tmp_path / "out", train=train)
    assert found == [trained] and any("mlp" in name for name in trained) is (train == "all")
    assert not [message for message in said if "missing keys" in message]


def test_a_loss_that_is_not_finite_ends_it() -> None:
    told = Told(lambda *_: None)

    class State:
        global_step = 7
        best_model_checkpoint: str | None = None

    told.on_log(None, State, None, logs={"loss": 1.0})
    with pytest.raises(GateError, match="healing did not help") as caught:
        told.on_log(None, State, None, logs={"loss": float("nan")})
    assert caught.value.where == "step 7" and "lower --rate" in caught.value.remedy
    control = TrainerControl(should_evaluate=True, should_save=True)
    State.best_model_checkpoint = "checkpoint-5"
    told.on_log(None, State, control, logs={"loss": float("nan")})
    assert control.should_training_stop and not control.should_evaluate and not control.should_save


def test_a_state_that_was_better_is_kept_when_the_loss_is_lost_later(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Healer.training_step
    whole = heal(inputs, tmp_path / "whole", tokens=6144)
    every = json.loads((tmp_path / "whole" / "healing.json").read_text("utf-8"))["heldout"][1]["step"]

    def lost(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = step(self, *args, **kwargs)
        return found * torch.nan if self.state.global_step >= every + 1 else found

    monkeypatch.setattr("transmla.healing.train.Healer.training_step", lost)
    report = heal(inputs, tmp_path / "out", tokens=6144)
    assert report.best_step == every <= whole.best_step
    written = json.loads((tmp_path / "out" / "healing.json").read_text("utf-8"))
    assert [entry["step"] for entry in written["heldout"]] == [0, every]
    assert all(math.isfinite(entry["loss"]) for entry in written["train"])


@pytest.mark.parametrize("name", ["eval_text.txt", "eval_eval_text.txt"])
def test_texts_may_be_called_as_the_trainer_calls_its_numbers(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(inputs / "text.txt", name)
    assert set(heal(inputs, tmp_path / "out", watch=name).texts) == {str(inputs / "text.txt"), name}


@pytest.mark.parametrize(
    ("version", "settings", "what"),
    [
        (None, {}, "FSDP1 is not supported"),
        ("1", {}, "FSDP1 is not supported"),
        ("2", {"cached": True}, "does not store its predictions"),
        ("2", {"on_policy": 0.5}, "does not write"),
    ],
)
def test_what_a_sharded_model_cannot_do_is_said_at_once(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, settings: Any, what: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(UnsupportedError, match=what):
        heal(inputs, tmp_path / "out", on_policy_tokens=8, **settings)
    assert not list(tmp_path.iterdir())


def test_parameters_that_were_renamed_are_not_lost_silently() -> None:
    model = torch.nn.Linear(3, 3)
    trainer: Any = SimpleNamespace(is_deepspeed_enabled=False, model=model)
    assert set(whole_tensors(trainer, {"weight"})) == {"weight"}
    with pytest.raises(VerificationError, match="cannot be found"):
        whole_tensors(trainer, {"weight", "module.weight"})


def test_nothing_is_left_of_a_run_that_ends_so(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Any, *_: Any, **__: Any) -> torch.Tensor:
        weight = next(weight for weight in self.model.parameters() if weight.requires_grad)
        return (weight * torch.nan).sum()

    monkeypatch.setattr("transmla.healing.train.Healer.training_step", nothing)
    with pytest.raises(GateError, match="the loss is nan"):
        heal(inputs, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["typo", "short"])
def test_a_text_that_cannot_be_used_leaves_nothing_in_the_way(inputs: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "short").write_text("Once upon a time.", encoding="utf-8")
    seen: set[str] = set()
    with pytest.raises(DataError):
        given = tmp_path / text if text == "short" else text
        heal(inputs, tmp_path / "out", data=str(given), progress=lambda stage, *_: seen.add(stage))
    assert not (tmp_path / "out.partial").exists() and not seen, "it is found before anything is computed"


def test_what_a_run_has_finished_is_kept_whatever_its_text(tmp_path: Path) -> None:
    remade = ("settings.json", "heldout-0.npy", "train.npy", "long.partial", "sampled.partial.npz", "texts.json.new")
    for name in remade:
        (tmp_path / name).touch()
    assert _has_no_step(tmp_path)
    for name in ("sampled.npz", "texts.json", "start.npy", "step.safetensors"):
        (tmp_path / name).touch()
        assert not _has_no_step(tmp_path), name
        (tmp_path / name).unlink()
    for name in ("unfolded", "checkpoints", "predictions"):
        (tmp_path / name).mkdir()
        assert not _has_no_step(tmp_path), name
        (tmp_path / name).rmdir()


def test_the_provenance_says_what_was_written(inputs: Path, tmp_path: Path) -> None:
    heal(inputs, tmp_path / "out")
    files = json.loads((tmp_path / "out" / "transmla.json").read_text())["files"]
    assert "model.safetensors" in files and transmla.verify(tmp_path / "out").passed


@pytest.mark.parametrize("gone", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", None])
def test_a_checkpoint_that_was_being_removed_is_none(tmp_path: Path, gone: str | None) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_text("x")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if gone is not None:
        (tmp_path / "checkpoint-4" / gone).unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{2 if gone else 4}")
    assert (tmp_path / "checkpoint-4").exists() == (gone is None)


def test_a_checkpoint_without_the_best_one_is_none(tmp_path: Path) -> None:
    for step, best in ((2, 2), (4, 2), (6, 5)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_text("x")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_global_step": best}))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4") and not (tmp_path / "checkpoint-6").exists()
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) is None


def test_a_journal_that_cannot_be_read_back_is_a_clear_error(tmp_path: Path) -> None:
    for read in (lambda: Windows(tmp_path / "train.npy"), lambda: packed_texts(tmp_path)):
        with pytest.raises(DestinationError) as caught:
            read()
        assert caught.value.exit_code == 8 and str(tmp_path) in caught.value.where
