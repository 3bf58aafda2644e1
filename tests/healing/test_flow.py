"""From a converted folder to a healed one: closer to its source, of the same kind, and the same after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch._dynamo.backends.registry import lookup_backend
from transformers import AutoModelForCausalLM

import transmla
import transmla.model.loading
from tests.families import MakeSource
from transmla.checkpoint.destination import journal_of
from transmla.cli import main
from transmla.errors import DestinationError, GateError, RecipeError, SourceError, UnsupportedError
from transmla.healing.choice import check, settings_for
from transmla.healing.flow import _healed, _require_gain
from transmla.healing.prepare import Preparation
from transmla.healing.schedule import schedule
from transmla.healing.train import Trained
from transmla.processes import ALONE
from transmla.recipe import Healing
from transmla.text.sources import read_text
from transmla.train import losses
from transmla.train.losses import divergence

SETTINGS: dict[str, Any] = {
    "tokens": 3072, "window": 64, "batch": 2, "heldout": 2, "evaluations": 3, "rate": 2e-2, "precision": "float32",
}  # fmt: skip
IDS = torch.arange(3, 67)[None]

PROGRAM = """
import json, sys
import torch
import transmla
torch.set_num_threads(1)
transmla.heal(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
"""
SHARDING = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip
# accelerate shards on GPUs only; gloo does it on the CPU all the same
SHARDED = """
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
made = AcceleratorState.__init__
def on_the_cpu(self, *args, fsdp_plugin=None, **kwargs):
    made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
AcceleratorState.__init__ = on_the_cpu
"""


@pytest.fixture(scope="module")
def converted(lively: MakeSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heal") / "mla"
    # where heal finds it, since the provenance file has no path
    shutil.copytree(lively(), folder.with_name("model"))
    transmla.convert(
        str(folder.with_name("model")), folder, latent=12, rope=4, refine="off", calibration=str(text_file),
        tokens=1024, window=64, theta=100.0,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def healed(converted: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("healed") / "out"
    return folder, transmla.heal(converted, folder, data=str(text_file), watch="wikitext-valid", **SETTINGS)


def logits(folder: str | Path, ids_1T: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, **kwargs)(ids_1T).logits
    return found


def curve(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "healing.json").read_text())["train"]]


def test_the_healed_folder_is_closer_to_its_source(
    converted: Path, healed: tuple[Path, Any], lively: MakeSource
) -> None:
    folder, report = healed
    words = transmla.model.loading.load_tokenizer(folder)
    text = read_text("tinystories-valid", 2000, evaluation=True)
    ids_1T = torch.tensor([words(text).input_ids[:256]])
    source = logits(lively(), ids_1T)
    before, after = (float(divergence(logits(one, ids_1T), source).mean()) for one in (converted, folder))
    assert after < 0.9 * before, "on a text that it has never seen"
    assert report.after[report.texts[0]]["divergence"] < report.before[report.texts[0]]["divergence"]
    assert report.after["wikitext-valid"]["recovery"] > 0 and report.texts[1] == "wikitext-valid"
    assert (report.tokens, report.steps) == (report.best_step * 2 * 64, 24)
    assert report.tokens_per_second > 0 < report.of_floor and not report.raised


def test_it_is_a_folder_of_the_same_kind(converted: Path, healed: tuple[Path, Any]) -> None:
    folder, _ = healed
    assert torch.allclose(logits(folder), logits(folder, trust_remote_code=True), atol=1e-3)
    names = [{path.name for path in one.iterdir()} for one in (converted, folder)]
    assert names[1] - names[0] == {"healing.json", "healing.png"} and not names[0] - names[1]
    configs = [json.loads((one / "config.json").read_text()) for one in (converted, folder)]
    assert configs[0] == configs[1]
    assert not folder.with_name("out.partial").exists()
    assert all(
        one.outcome == two.outcome
        for one, two in zip(transmla.doctor(converted).engines, transmla.doctor(folder).engines, strict=True)
    )


def test_provenance_goes_on(converted: Path, healed: tuple[Path, Any], text_file: Path) -> None:
    folder, report = healed
    before, after = (json.loads((one / "transmla.json").read_text()) for one in (converted, folder))
    (entry,) = after.pop("healed")
    assert before.pop("files") != after.pop("files") and before == after
    assert entry["parent"]["name"] == "mla" and len(entry["parent"]["files"]["model.safetensors"]) == 64
    assert entry["settings"]["data"] == text_file.name and entry["tokens"] == report.tokens
    assert entry["after"][text_file.name]["recovery"] > entry["before"][text_file.name]["recovery"]
    card = (folder / "README.md").read_text()
    assert card.startswith((converted / "README.md").read_text().rstrip()) and "## Healed" in card
    assert (folder / "healing.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_attention_was_trained(converted: Path, healed: tuple[Path, Any]) -> None:
    states = [AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (converted, healed[0])]
    for name, tensor in states[0].items():
        if "layernorm" in name:  # a scale that is chosen anew
            continue
        same = torch.allclose(tensor, states[1][name], rtol=1e-5, atol=1e-8)
        assert same != (".self_attn." in name), name


def test_adapters_are_merged(converted: Path, text_file: Path, tmp_path: Path) -> None:
    report = transmla.heal(
        converted, tmp_path / "out", data=str(text_file), **SETTINGS | {"lora": 2, "rate": 1e-1, "checkpointing": True}
    )
    whole = sum(
        tensor.numel()
        for name, tensor in AutoModelForCausalLM.from_pretrained(converted).state_dict().items()
        if ".self_attn." in name
    )
    assert report.num_trained < whole / 4
    assert report.after[str(text_file)]["divergence"] < report.before[str(text_file)]["divergence"]
    assert torch.isfinite(logits(tmp_path / "out")).all()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any("adapter" in name for name in files)


def test_layers_that_are_computed_twice_train_alike(converted: Path, text_file: Path, tmp_path: Path) -> None:
    common = SETTINGS | {"data": str(text_file), "tokens": 512, "evaluations": 1}
    transmla.heal(converted, tmp_path / "once", **common)
    transmla.heal(converted, tmp_path / "twice", **common, checkpointing=True)
    assert curve(tmp_path / "twice") == pytest.approx(curve(tmp_path / "once"), rel=1e-5)


# dynamo looks at the gradients of what it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_train_alike(
    converted: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a C++ compiler: what is traced is run, gradients and all, by the functions of torch."""
    graphs: list[Any] = []

    def traced(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: plain(function, backend=traced))
    losses._compiled.cache_clear()
    common = SETTINGS | {"data": str(text_file), "tokens": 512, "evaluations": 1}
    transmla.heal(converted, tmp_path / "plain", **common)
    assert not graphs
    transmla.heal(converted, tmp_path / "compiled", **common, compile=True)
    losses._compiled.cache_clear()
    # layers of a kind share a graph
    assert 0 < len(graphs) <= 12
    assert curve(tmp_path / "compiled") == pytest.approx(curve(tmp_path / "plain"), rel=1e-4)


def test_without_a_compiler_it_says_what_to_install(
    converted: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before text is packed and models are loaded."""
    plain = torch.compile

    def missing(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, **_: plain(function, backend=missing))
    with pytest.raises(UnsupportedError, match="No working C\\+\\+ compiler") as caught:
        transmla.heal(converted, tmp_path / "out", **SETTINGS | {"data": str(text_file)}, compile=True)
    assert "g++" in caught.value.remedy and not list(tmp_path.iterdir())


def test_it_heals_on_every_device(converted: Path, text_file: Path, tmp_path: Path, device: torch.device) -> None:
    if device.type == "pretended":
        pytest.skip("transformers' Trainer does not know it")
    common = SETTINGS | {"data": str(text_file), "tokens": 1536, "evaluations": 2}
    report = transmla.heal(converted, tmp_path / "out", device=device.type, **common)
    assert report.after[str(text_file)]["divergence"] < report.before[str(text_file)]["divergence"]
    assert logits(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64 - 1])
def test_any_whole_number_is_a_seed(
    converted: Path, text_file: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of numpy and the Trainer, too."""
    seen: list[int] = []

    def begun(preparation: Preparation, *_: Any) -> None:
        seen.append(preparation.settings.seed)
        raise KeyboardInterrupt

    monkeypatch.setattr("transmla.healing.flow._train", begun)
    with pytest.raises(KeyboardInterrupt):
        transmla.heal(converted, tmp_path / "out", **SETTINGS | {"data": str(text_file)}, seed=seed)
    assert seen == [seed % 2**32]


def test_windows_longer_than_the_context_are_shortened_before_they_are_counted(
    converted: Path, text_file: Path, tmp_path: Path
) -> None:
    common = SETTINGS | {"data": str(text_file), "window": 1000, "tokens": 1536, "evaluations": 1}
    report = transmla.heal(converted, tmp_path / "out", **common)
    # 256 positions, two windows a step
    assert (report.tokens, report.steps, report.distinct) == (1536, 3, 1536)


def test_long_windows_are_shortened_as_well(
    converted: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def begun(preparation: Preparation, plan: Any, *_: Any) -> None:
        seen.extend((preparation.settings.long_window, plan.long_window))
        raise KeyboardInterrupt

    monkeypatch.setattr("transmla.healing.flow._train", begun)
    with pytest.raises(KeyboardInterrupt):
        transmla.heal(converted, tmp_path / "out", **SETTINGS | {"data": str(text_file)}, long_share=0.5)
    assert seen == [256, 256]
    with pytest.raises(RecipeError, match=r"not longer than the others(?s:.*)256 tokens"):
        transmla.heal(
            converted, tmp_path / "out", **SETTINGS | {"data": str(text_file), "window": 1000}, long_share=0.5
        )


def test_kept_predictions_train_like_the_source_itself(converted: Path, text_file: Path, tmp_path: Path) -> None:
    # a rate at which these random texts are learned in whatever order they come
    common = SETTINGS | {"data": str(text_file), "top_k": 16, "distinct": 640, "rate": 5e-3}
    transmla.heal(converted, tmp_path / "online", **common)
    transmla.heal(converted, tmp_path / "cached", **common, cached=True)
    assert curve(tmp_path / "cached") == pytest.approx(curve(tmp_path / "online"), rel=5e-3)
    assert len(set(curve(tmp_path / "online"))) > 3


def test_what_does_not_help_is_not_written(converted: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="healing did not help") as caught:
        transmla.heal(converted, tmp_path / "out", data=str(text_file), **SETTINGS | {"rate": 30.0})
    assert "lower --rate" in caught.value.remedy and not list(tmp_path.iterdir())


def outcome(losses: tuple[float, float], nats: tuple[float, float], raised: list[str] | None = None) -> Trained:
    """losses: before and after ten steps;  nats: likewise, of the held-out text;  raised: texts after ten steps"""
    log = [{"step": step, "eval_loss": loss, "eval_score": loss} for step, loss in zip((0, 10), losses, strict=True)]
    before, after = ({"text": {"nats": one, "recovery": 0.9, "recovery_error": 0.009}} for one in nats)
    best = 10 if losses[1] < losses[0] else 0  # as the Trainer says it
    return Trained({}, log, best, 1, 1e-3, schedule(Healing(), 1), before, after, {0: [], 10: raised or []})


def test_a_state_that_loses_a_text_is_not_the_best_one(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(GateError) as caught:
        _require_gain(outcome((1.0, float("inf")), (2.0, 1.9), ["text"]), work, ALONE)
    assert "in 1 of 1 states the divergence on text had risen" in caught.value.why


def test_where_a_healed_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mla" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mla" / "inside")
    assert _healed(Path("..")) == tmp_path / "mla-healed" and _healed(Path("a/b")) == Path("a/b-healed")
    assert _healed(Path(".")) == tmp_path / "mla" / "inside-healed"


@pytest.mark.parametrize(
    ("losses", "nats", "why"),
    [
        ((1.0, 0.5), (2.0, 1.9), None),
        ((1.0, 0.5), (2.0, 2.005), None),  # within its error
        ((1.0, 0.5), (2.0, 2.1), "perplexity rose from 7.389 to 8.166"),
        ((1.0, 1.0), (2.0, 1.9), "1.0000 before and 1.0000 at best"),
        ((1.0, float("inf")), (2.0, 1.9), "1.0000 before and 1.0000 at best"),
        ((1.0, float("nan")), (2.0, 1.9), "1.0000"),
        ((1.0, 0.5), (2.0, float("nan")), "perplexity rose"),
    ],
)
def test_a_gain_is_nearer_to_the_source_and_no_worse_on_the_text(
    tmp_path: Path, losses: tuple[float, float], nats: tuple[float, float], why: str | None
) -> None:
    work = journal_of(tmp_path / "out")
    work.mkdir(parents=True)
    if why is None:
        _require_gain(outcome(losses, nats), tmp_path / "out", ALONE)
    else:
        with pytest.raises(GateError, match="healing did not help") as caught:
            _require_gain(outcome(losses, nats), tmp_path / "out", ALONE)
        assert why in caught.value.why
    assert work.is_dir() == (why is None)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"cached": True, "hidden": 1.0}, RecipeError, "`hidden` and `cached` cannot be combined"),
        ({"on_policy": 0.5, "cached": True}, RecipeError, "`on_policy` and `cached` cannot be combined"),
        ({"on_policy": 0.5, "cross_entropy": 0.1}, RecipeError, "`on_policy` and `cross_entropy`"),
        ({"on_policy": 0.5, "window": 64}, RecipeError, "does not fit into a window"),
        ({"teacher": "stories260k", "hidden": 1.0}, RecipeError, "`teacher` and `hidden`"),
        ({"layerwise": 0.5, "checkpointing": True}, RecipeError, "`layerwise` and `checkpointing`"),
        ({"layerwise": 0.5, "compile": True}, RecipeError, "`layerwise` and `compile`"),
        ({"long_share": 0.1, "cached": True}, RecipeError, "`long_share` and `cached`"),
        ({"long_share": 0.1, "window": 4096}, RecipeError, "not longer than the others"),
        ({"on_policy": 1.5}, RecipeError, "cannot be 1.5"),
        ({"lora": 4, "train": "all"}, RecipeError, "adapters can only be trained on the attention"),
        ({"device": "cuda:1"}, UnsupportedError, "healing does not run on cuda:1"),
        ({"trian": "all"}, RecipeError, "unknown recipe key 'trian'"),
        ({"cross_entropy": 2.0}, RecipeError, "cannot be 2.0"),
        ({"heldout": 1}, RecipeError, "too few windows are held out"),
        ({"source": "nowhere"}, SourceError, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    converted: Path, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        transmla.heal(converted, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_what_a_recipe_sets_can_be_taken_back() -> None:
    """The recipe of stories260k has `hidden`, and --cached alone cannot say that it is not wanted."""
    with pytest.raises(RecipeError, match="--hidden 0"):
        check(settings_for(None, "stories260k").with_overrides(cached=True), "cpu")
    check(settings_for(None, "stories260k").with_overrides(cached=True, hidden=0.0), "cpu")


def test_without_model_or_recipe_there_is_nothing_to_heal(lively: MakeSource, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to heal"):
        transmla.heal()
    with pytest.raises(UnsupportedError, match="not a converted folder"):
        transmla.heal(lively(), tmp_path / "out")


def test_command(converted: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--data", str(text_file), "--tokens", "0.5K", "--window", "64", "--heldout", "2", "--evaluations", "1"]
    done = CliRunner().invoke(main, ["heal", str(converted), str(tmp_path / "out"), *options, "--rate", "1e-2", "-q"])
    assert done.exit_code == 0, done.output
    assert "512 tokens, 8 steps" in done.output and "recovery" in done.output and (tmp_path / "out").is_dir()
    again = CliRunner().invoke(main, ["heal", str(converted), str(tmp_path / "out"), *options])
    assert again.exit_code == DestinationError.exit_code and "exists already" in again.output
    wrong = CliRunner().invoke(main, ["heal", str(converted), "--tokens", "some"])
    assert wrong.exit_code == 2 and "not a number of tokens" in wrong.output


def launch(program: str, arguments: list[str], port: int, **extra: str) -> None:
    """As launchers do it, in two processes."""
    started = []
    for rank in range(2):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
        command = [sys.executable, "-c", program, *arguments]
        started.append(subprocess.Popen(command, env=environment | extra))
    assert [process.wait(timeout=300) for process in started] == [0, 0]


@pytest.fixture(scope="module")
def healed_by_one(converted: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "one"
    transmla.heal(converted, folder, data=str(text_file), **SETTINGS)
    return folder


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_heal_like_one(
    converted: Path, healed_by_one: Path, text_file: Path, tmp_path: Path, free_port: int, kind: str
) -> None:
    options = json.dumps(SETTINGS | {"data": str(text_file)})
    program, extra = (SHARDED + PROGRAM, SHARDING) if kind == "FSDP2" else (PROGRAM, {})
    launch(program, [str(converted), str(tmp_path / "two"), options], free_port, **extra)
    # gradients are summed in another order, and Adam divides small numbers by small numbers
    assert curve(tmp_path / "two") == pytest.approx(curve(healed_by_one), rel=1e-3)
    assert torch.allclose(logits(tmp_path / "two"), logits(healed_by_one), atol=2e-2)
    entry = json.loads((tmp_path / "two" / "transmla.json").read_text())["healed"][0]
    assert entry["processes"] == 2 and entry["settings"]["batch"] == 2


def test_a_killed_run_goes_on(converted: Path, text_file: Path, tmp_path: Path) -> None:
    options = SETTINGS | {"data": str(text_file), "tokens": 6144, "evaluations": 8}
    transmla.heal(converted, tmp_path / "whole", **options)
    target = tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, str(converted), str(target), json.dumps(options)]
    running = subprocess.Popen(command)
    checkpoints = tmp_path / "killed.partial" / "journal" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not target.exists()
    with pytest.raises(DestinationError, match="other settings"):
        transmla.heal(converted, target, **options | {"rate": 1e-4})
    transmla.heal(converted, target, **options)
    assert curve(target) == pytest.approx(curve(tmp_path / "whole"), rel=1e-5)
    assert torch.allclose(logits(target), logits(tmp_path / "whole"), atol=1e-4)
    assert not (tmp_path / "killed.partial").exists()


def test_a_recipe_s_hidden_beside_a_teacher() -> None:
    """The command did not name it, so the remedy says how it is left out."""
    settings = settings_for(None, "stories260k").with_overrides(teacher="stories260k")
    with pytest.raises(RecipeError, match="`teacher` and `hidden`") as caught:
        check(settings, "cpu")
    assert "--hidden 0" in caught.value.remedy
    check(settings.with_overrides(hidden=0.0), "cpu")
