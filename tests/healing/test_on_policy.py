"""Windows that the model writes: how many, from which prompts, what is learned of them, and the same after a kill."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import transmla
from tests.families import MakeSource, lively_config, lively_model
from transmla.errors import DataError
from transmla.healing.on_policy import OnPolicy, forget
from transmla.healing.windows import Windows, write_windows
from transmla.processes import ALONE, Processes
from transmla.progress import silent
from transmla.recipe import Healing
from transmla.text.packing import IGNORED, Answered, pack

SETTINGS = Healing(window=32, on_policy=0.4, on_policy_tokens=12, resample=5)
PER_STEP = 3


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model(lively_config(layers=1))


@pytest.fixture
def train(tmp_path: Path) -> Windows:
    """Documents that count up, and one kind of which only the answer, 300 ..., is learned."""
    documents: list[list[int]] = []
    for number in range(30):
        documents.append(list(range(100 + number, 140 + number)))
        documents.append(Answered([*range(3, 9), *range(300, 320)], [False] * 6 + [True] * 20))
    write_windows(tmp_path / "train.npy", pack(documents, 32), 40, 32, silent, "pack")
    return Windows(tmp_path / "train.npy")


def own(model: Any, train: Windows, folder: Path, processes: Processes = ALONE, **changed: Any) -> OnPolicy:
    settings = SETTINGS.with_overrides(**changed)
    return OnPolicy(model, train, settings, PER_STEP, folder, processes, contextlib.nullcontext, silent)


def batches(policy: OnPolicy, train: Windows, steps: range, at_once: int) -> list[torch.Tensor]:
    """All rows of ids, as training would see them."""
    rows: list[torch.Tensor] = []
    for step in steps:
        for start in range(0, PER_STEP, at_once):
            items = [train[start + row] for row in range(min(at_once, PER_STEP - start))]
            given = {name: torch.stack([item[name] for item in items]) for name in items[0]}
            before = given["input_ids"].clone()
            rows += policy.mixed(step, given)["input_ids"]
            assert torch.equal(given["input_ids"], before), "what the Trainer drew was changed in place"
    return rows


def test_a_share_of_the_windows_is_exchanged(model: Any, train: Windows, tmp_path: Path) -> None:
    found = batches(own(model, train, tmp_path / "own"), train, range(5), 1)
    given = {tuple(train[row]["input_ids"].tolist()) for row in range(PER_STEP)}
    exchanged = [tuple(row.tolist()) not in given for row in found]
    assert sum(exchanged) == 6 and exchanged == [False, False, True, False, True] * 3
    # however the windows of a step are divided into batches
    again = batches(own(model, train, tmp_path / "other"), train, range(5), 3)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    assert batches(own(model, train, tmp_path / "none", on_policy=0.0), train, range(2), 3)[0].tolist() in map(
        list, given
    )


# dynamo looks at the gradients of what it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_nothing_is_compiled_for_writing(train: Windows, tmp_path: Path) -> None:
    """A cache makes a graph of every layer and every step, until there are too many for training, too."""
    model, graphs = lively_model(lively_config(layers=1)), []

    def traced(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    for layer in model.model.layers:
        layer.compile(backend=traced)
    batches(own(model, train, tmp_path / "own"), train, range(2), 3)
    assert not graphs
    model(torch.arange(3, 9)[None], use_cache=False)
    assert graphs


def test_a_resumed_run_sees_the_same_windows(model: Any, train: Windows, tmp_path: Path) -> None:
    whole = batches(own(model, train, tmp_path / "own"), train, range(15), 1)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [f"00000{n}-0.npy" for n in range(3)]
    # in the middle of a block, with a model that could not write them any more
    resumed = batches(own(None, train, tmp_path / "own"), train, range(7, 15), 1)
    assert all(torch.equal(one, two) for one, two in zip(whole[7 * PER_STEP :], resumed, strict=True))
    blocks = [np.load(tmp_path / "own" / f"00000{n}-0.npy") for n in range(3)]
    assert not np.array_equal(blocks[0], blocks[1])
    other = own(model, train, tmp_path / "own", Processes(1, 2))
    batches(other, train, range(1), 1)
    assert not np.array_equal(np.load(tmp_path / "own" / "000000-1.npy"), blocks[0])
    forget(tmp_path / "own", 2)
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["000002-0.npy"]


def test_prompts_are_beginnings_or_turns_and_are_not_learned(model: Any, train: Windows, tmp_path: Path) -> None:
    policy = own(model, train, tmp_path / "own", on_policy=1.0)
    draw = np.random.default_rng(0)
    prompts = [policy._prompt(draw) for _ in range(300)]
    asked = [prompt for prompt in prompts if prompt[0] == 3]
    assert asked and all(prompt == [3, 4, 5, 6, 7, 8] for prompt in asked)
    others = [prompt for prompt in prompts if prompt[0] != 3]
    assert max(map(len, prompts)) == 20, "a prompt and what is written behind it fit into a window"
    assert all(prompt == list(range(prompt[0], prompt[0] + len(prompt))) for prompt in others)
    batches(policy, train, range(1), 1)
    rows = np.load(tmp_path / "own" / "000000-0.npy")
    assert len(rows) == 5 * PER_STEP
    for ids, positions, labels in rows:
        starts = np.flatnonzero(positions == 0)
        assert len(starts) > 1
        # of what begins inside the window: a prompt of which nothing is learned, but for its last token's successor
        for start, end in zip(starts[1:], [*starts[2:], 32], strict=True):
            learned = np.flatnonzero(labels[start:end] != IGNORED)
            if len(learned):
                first = start + learned[0]
                assert labels[first] == ids[first + 1] if first + 1 < 32 else True
                assert len(learned) <= 12
        places = np.flatnonzero((labels != IGNORED)[:-1])
        assert (labels[places] == ids[places + 1]).all()


def test_prompts_stop_before_the_end_of_a_document(model: Any, tmp_path: Path) -> None:
    """Behind it the model would write as if the document had not ended; an end inside is that of a turn."""
    end = model.config.eos_token_id
    documents = [[100, 101, 102, end], [*range(100, 104), end], [*range(100, 103), end, *range(103, 106), end]]
    write_windows(tmp_path / "short.npy", pack(documents * 4, 34), 2, 34, silent, "pack")
    policy = own(model, Windows(tmp_path / "short.npy"), tmp_path / "own")
    draw = np.random.default_rng(0)
    prompts = {tuple(policy._prompt(draw)) for _ in range(200)}
    turns = (100, 101, 102, end, 103, 104, 105)
    assert prompts == {(100, 101, 102, 103), *(turns[:given] for given in range(4, 8))}
    write_windows(tmp_path / "none.npy", pack(documents[:1] * 8, 32), 1, 32, silent, "pack")
    with pytest.raises(DataError, match="nothing that the model could go on from"):
        own(model, Windows(tmp_path / "none.npy"), tmp_path / "own")._prompt(draw)


def test_of_turns_that_are_too_long_the_last_ones_are_kept(model: Any, tmp_path: Path) -> None:
    """What asks for the answer stands at their end."""
    write_windows(
        tmp_path / "turns.npy", pack([Answered(range(100, 132), [False] * 28 + [True] * 4)] * 2, 32), 2, 32, silent, ""
    )  # fmt: skip
    policy = own(model, Windows(tmp_path / "turns.npy"), tmp_path / "own")
    assert policy._prompt(np.random.default_rng(0)) == list(range(108, 128))


def test_every_text_draws_numbers_of_its_own(
    model: Any, train: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it takes several rounds to fill the windows; another seed is another text."""
    drawn: list[tuple[int, int]] = []

    def short(_: Any, prompts: list[list[int]], new_tokens: int, *, seed: int, first: int) -> list[list[int]]:
        drawn.extend((seed, first + number) for number in range(len(prompts)))
        return [[7]] * len(prompts)

    monkeypatch.setattr("transmla.healing.on_policy.write", short)
    for seed in (0, 1):
        batches(own(model, train, tmp_path / str(seed), seed=seed), train, range(6), 1)
    seeds = [seed for seed, _ in drawn]
    assert len(set(drawn)) == len(drawn) > 50 and len(set(seeds)) == 4


@pytest.fixture(scope="module")
def source(lively: MakeSource) -> str:
    return str(lively())


@pytest.fixture(scope="module")
def converted(source: str, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "mla"
    transmla.convert(
        source, folder, latent=12, rope=4, refine="off", calibration=str(text_file), tokens=1024, window=64,
        theta=100.0,
    )  # fmt: skip
    return folder


def test_it_heals_on_its_own_text_and_goes_on_after_a_kill(
    converted: Path, source: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "source": source,
        "data": str(text_file), "tokens": 6144, "window": 64, "batch": 2, "heldout": 4, "evaluations": 4, "rate": 2e-2,
        "precision": "float32", "on_policy": 0.5, "on_policy_tokens": 24, "resample": 8,
    }  # fmt: skip
    report = transmla.heal(converted, tmp_path / "whole", **options)
    assert report.after[str(text_file)]["divergence"] < report.before[str(text_file)]["divergence"]

    def curve(folder: Path) -> list[float]:
        return [entry["loss"] for entry in json.loads((folder / "healing.json").read_text())["train"]]

    ordinary = transmla.heal(converted, tmp_path / "ordinary", **options | {"on_policy": 0.0})
    assert curve(tmp_path / "ordinary") != curve(tmp_path / "whole") and ordinary.steps == report.steps

    def interrupt(stage: str, done: int, *_: Any) -> None:
        if stage == "heal" and done == 29:  # behind the second checkpoint, and within a block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transmla.heal(converted, tmp_path / "killed", progress=interrupt, **options)
    kept = tmp_path / "killed.partial" / "journal" / "on-policy"
    # the block of the checkpoint, in the middle of which a resumed run starts, and the later one
    assert sorted(path.name for path in kept.iterdir()) == ["000003-0.npy"]
    transmla.heal(converted, tmp_path / "killed", **options)
    assert curve(tmp_path / "killed") == pytest.approx(curve(tmp_path / "whole"), rel=1e-5)
