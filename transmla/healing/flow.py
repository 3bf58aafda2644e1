"""The flow: unfold -> windows -> (source's predictions) -> train -> fold -> verify.

Everything unfinished lies in the journal beside the destination, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from transmla.calibrate.sampling import sample_from
from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.destination import check_destination, journal_of
from transmla.checkpoint.journal import Journal
from transmla.checkpoint.provenance import FILE_NAME, file_hashes, read_provenance, versions
from transmla.checkpoint.read import Source
from transmla.checkpoint.write import CheckpointWriter
from transmla.conversion import default_destination
from transmla.errors import GateError, RecipeError, UnsupportedError
from transmla.exporting import open_converted
from transmla.folding import fold_into, open_unfolded, unfold
from transmla.healing.curves import LOG_FILE, METRICS, PLOT_FILE, healing_curve, write_curve
from transmla.healing.data import SELF, Part, Windows, mixed, open_text, parse_mix, write_windows
from transmla.healing.packing import pack
from transmla.healing.student import halve_frozen, select_trained, teach, with_adapters
from transmla.healing.teacher import CachedTeacher, OnlineTeacher, record
from transmla.healing.training import autocast, last_checkpoint, learning_rate, schedule, trainer, whole_tensors
from transmla.loading import load, load_source, open_model
from transmla.maths.distillation import Objective
from transmla.modeling.modeling_transmla import UnfoldedForCausalLM
from transmla.planning import plan
from transmla.processes import Processes
from transmla.recipe import Healing, find_recipe, list_recipes, load_recipe

# predictions that are kept of each token if the recipe does not say
CACHED_TOP_K = 64
# tokens that a source writes at most; then they begin anew
MOST_SAMPLED = 4_000_000
# of what was packed: tokens of each text, and in how many passes
TEXTS = "texts.json"


@dataclass(frozen=True)
class HealReport:
    """before, after: of the held-out windows of each text (`texts`; the first is of what was trained on), their
    `divergence` from the source and `nats` per token, `source_nats`, `recovery` (perplexity of the source over that of
    the model) and `recovery_error`, one standard error over windows;  distinct: tokens that
    were packed;  passes: begun over each text for that
    """

    parent: Path
    destination: Path
    source: str
    texts: tuple[str, ...]
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    tokens: int
    steps: int
    best_step: int
    num_trained: int
    rate: float
    distinct: int
    passes: dict[str, int]
    seconds: float


def heal(
    model: str | Path | None = None,
    destination: str | Path | None = None,
    *,
    source: str | None = None,
    recipe: str | Path | None = None,
    device: str = "cpu",
    restart: bool = False,
    progress: Any = None,
    **settings: Any,
) -> HealReport:
    """Distil the source's predictions into a converted folder and write the result as a folder of the same kind.

    model:       converted folder; default: what `convert` names the conversion of the recipe
    destination: new folder, default MODEL-healed
    source:      of the conversion; default: what the provenance file of `model` says
    recipe:      name or file whose table [heal] is used; default: the recipe of that source, if there is one
    device:      "cpu" or "cuda"; under `accelerate launch` every process takes its own
    restart:     delete an unfinished run to the same destination instead of going on with it
    settings:    any field of `transmla.recipe.Healing`: tokens, data, train, rate, lora, watch ...
    progress:    called as progress(stage, done, total, remark)

    Raises the errors of `transmla.errors`; `GateError` if the held-out divergence could not be lowered, in which case
    nothing is written. A run that was interrupted leaves DESTINATION.partial, and the same call goes on from there.
    """
    started = time.monotonic()
    tell = progress or (lambda *_: None)
    parent = Path(model) if model is not None else _of_recipe(recipe)
    opened = open_converted(parent)
    provenance = read_provenance(parent)
    name = source or str(provenance["source"]["name"])
    wanted = _settings(recipe, name).with_overrides(**settings)
    _check(wanted, device)
    target = Path(destination) if destination is not None else parent.with_name(f"{parent.name}-healed")
    check_destination(target, 4 * sum(info.num_bytes for info in opened.tensors.values()))
    of_source = open_model(name)
    processes = Processes.current(device)
    where = processes.device(device)
    set_seed(wanted.seed)
    run = _Run(parent, opened, of_source, wanted, processes, where, device, tell)
    if processes.first:
        journal = Journal(target, _fingerprint(parent, name, wanted, processes), restart=restart)
        with CheckpointWriter(target) as writer:
            work = journal.begin()
            processes.wait()
            run.train(work)
            _write(run, work, writer, provenance, name)
    else:
        processes.wait()  # for the folder
        run.train(journal_of(target))
    processes.wait()
    return run.report(name, target, started)


class _Run:
    """One healing in this process, and what came of it."""

    def __init__(
        self,
        parent: Path,
        opened: Source,
        of_source: Source,
        settings: Healing,
        processes: Processes,
        where: torch.device,
        device: str,
        tell: Any,
    ) -> None:
        self.parent, self.opened, self.of_source, self.settings = parent, opened, of_source, settings
        self.processes, self.where, self.device, self.tell = processes, where, device, tell
        self.length = min(settings.window, opened.config["max_position_embeddings"])
        self.made = schedule(settings, processes.size)
        watched = settings.watch.split("+") if settings.watch else []
        self.texts = [Part(name) for name in (settings.data, *watched)]
        self.log: list[dict[str, Any]] = []
        self.trained: dict[str, Tensor] = {}
        self.passes: dict[str, int] = {}
        self.num_trained, self.rate, self.best_step = 0, 0.0, 0

    def train(self, work: Path) -> None:
        """From the unfolded form to the trained tensors; every process."""
        settings = self.settings
        if self.processes.first and not (work / "unfolded").is_dir():
            unfold(self.parent, work / "unfolded", dtype="float32", progress=self.tell)
        self.processes.wait()
        train, heldout = self._windows(work)
        packed = json.loads((work / TEXTS).read_text())
        self.passes = {name: one["passes"] for name, one in packed.items()}
        precision = autocast(settings.precision, self.where)
        objective = Objective(settings.temperature, settings.cross_entropy)
        teacher = self._teacher(work, train, heldout, precision)

        # Trainer moves it to its device
        unfolded: Any = load(work / "unfolded", dtype=torch.float32)
        student = teach(unfolded, teacher, objective, settings.hidden)
        sharded = _is_sharded()
        select_trained(student, settings.train)
        if settings.checkpointing:
            # the older name before transformers 5.22
            enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        model: Any = student
        if settings.lora is not None:
            model = with_adapters(student, settings.lora)
        if settings.precision == "bfloat16" and not sharded:
            halve_frozen(student)
        self.num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.rate = learning_rate(settings, self.num_trained)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        made = trainer(
            model, settings, self.made, self.rate, work / "checkpoints", self.device, train, heldout,
            [part.name for part in self.texts], self.tell,
        )  # fmt: skip
        begun = last_checkpoint(work / "checkpoints") if self.processes.first else None
        made.train(resume_from_checkpoint=self.processes.from_first(begun))
        self.log = _once(made.state.log_history)
        self.best_step = _step_of(made.state.best_model_checkpoint)
        trained = whole_tensors(made, names)
        self._require_gain(work)
        if self.processes.first:
            self.trained = trained

    def before_and_after(self) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        """Of each text, from the first evaluation and from that of the step that was kept."""
        found = {entry["step"]: entry for entry in self.log if "eval_loss" in entry}
        return tuple(  # type: ignore[return-value]
            {part.name: {key: found[step][f"eval_{part.name}/{key}"] for key in METRICS} for part in self.texts}
            for step in (0, self.best_step)
        )

    def _require_gain(self, work: Path) -> None:
        """All processes have the same numbers. What is of no use is not kept to go on with."""
        found = {entry["step"]: entry["eval_loss"] for entry in self.log if "eval_loss" in entry}
        if not found[self.best_step] < found[0]:
            if self.processes.first:
                shutil.rmtree(work)
            raise GateError(
                "healing did not help",
                where="the held-out windows",
                why=f"their loss was {found[0]:.4f} before, and {min(found.values()):.4f} at best",
                remedy="try a lower --rate, more or other text (--data); nothing was written",
            )

    def report(self, name: str, target: Path, started: float) -> HealReport:
        before, after = self.before_and_after()
        return HealReport(
            self.parent, target, name, tuple(part.name for part in self.texts), before, after,
            self.best_step * self.made.batch * self.length, self.made.steps, self.best_step, self.num_trained,
            self.rate, min(self.made.num_windows, self.made.windows_seen) * self.length, self.passes,
            time.monotonic() - started,
        )  # fmt: skip

    def unfolded_and_trained(self, work: Path) -> UnfoldedForCausalLM:
        """On the CPU in float32, adapters merged; frozen weights exactly as they were."""
        model: Any = load(work / "unfolded", dtype=torch.float32)
        if self.settings.lora is None:
            model.load_state_dict(self.trained, strict=False)
            return model
        model = with_adapters(model, self.settings.lora)
        model.load_state_dict(self.trained, strict=False)
        return model.merge_and_unload()

    def _windows(self, work: Path) -> tuple[Windows, list[Windows]]:
        """Packed by the first process, mapped by all."""
        paths = [work / "train.npy", *(work / f"heldout-{number}.npy" for number in range(len(self.texts)))]
        if self.processes.first and not all(path.is_file() for path in (*paths, work / TEXTS)):
            self._pack(work, paths)
        self.processes.wait()
        files = [Windows(paths[0])]
        for path in paths[1:]:
            files.append(Windows(path, sum(map(len, files))))
        return files[0], files[1:]

    def _pack(self, work: Path, paths: list[Path]) -> None:
        settings, words = self.settings, tokenizer(self.opened)
        num_windows = self.made.num_windows
        parts = parse_mix(settings.data)

        own_share = sum(part.weight for part in parts if part.name == SELF) / sum(part.weight for part in parts)

        def sampled() -> Tensor:
            path = work / "sampled.npy"
            if not path.is_file():
                # a little more than is drawn, since what an end token cuts off is another document
                wanted = math.ceil(1.02 * own_share * num_windows) + 2 * settings.heldout + 2
                wanted = min(wanted, MOST_SAMPLED // self.length)
                model = load_source(self.of_source, dtype=torch.bfloat16, device=str(self.where))
                tokens_NT = sample_from(
                    model, wanted, self.length, seed=settings.seed,
                    progress=lambda done, total: self.tell("sample", done, total, "tokens"),
                )  # fmt: skip
                np.save(path.with_suffix(".partial.npy"), tokens_NT.numpy())
                path.with_suffix(".partial.npy").rename(path)
            return torch.from_numpy(np.load(path))

        texts = [open_text(part, words, self.length, sampled, evaluation=False) for part in parts]
        share = -(-settings.heldout // len(texts))
        for text in texts:
            text.hold_out(share, self.length)
        watched = [open_text(part, words, self.length, sampled, evaluation=True) for part in self.texts[1:]]
        for text in watched:
            text.hold_out(settings.heldout, self.length)
        heldout = [[window for text in texts for window in text.heldout], *(text.heldout for text in watched)]
        for path, kept in zip(paths[1:], heldout, strict=True):
            write_windows(path, kept, len(kept), self.length, self.tell, "hold out")
        rows = pack(mixed(texts, settings.seed), self.length)
        write_windows(paths[0], rows, num_windows, self.length, self.tell, "pack")
        (work / TEXTS).write_text(
            json.dumps({text.part.name: {"tokens": text.drawn, "passes": text.begun} for text in texts})
        )

    def _teacher(self, work: Path, train: Windows, heldout: list[Windows], precision: Any) -> Any:
        settings = self.settings
        k = settings.top_k or (CACHED_TOP_K if settings.cached else None)
        folder = work / "predictions"
        if settings.cached and (folder / "done").is_file():
            return CachedTeacher(folder, self.where)
        online = OnlineTeacher(
            self._source_model(), precision, k=k, temperature=settings.temperature, streams=settings.hidden > 0
        )
        if not settings.cached:
            return online
        for windows in (train, *heldout):
            record(online, windows, folder, self.processes.mine(len(windows)), self.where, self.tell)
        self.processes.wait()
        if self.processes.first:
            (folder / "done").touch()
        return CachedTeacher(folder, self.where)

    def _source_model(self) -> Any:
        half = self.settings.precision == "bfloat16"
        if _is_sharded():
            model = load_source(self.of_source, dtype=torch.bfloat16 if half else torch.float32, device=str(self.where))
            return _shard(model.requires_grad_(False))
        model = load_source(self.of_source, dtype=torch.float32).requires_grad_(False)
        if half:
            halve_frozen(model)
        return model.to(self.where)


def _write(run: _Run, work: Path, writer: CheckpointWriter, provenance: dict[str, Any], name: str) -> None:
    """The healed folder through the unfolded one, verified and given its name."""
    trained = work / "trained"
    shutil.rmtree(trained, ignore_errors=True)
    shutil.copytree(work / "unfolded", trained, ignore=shutil.ignore_patterns("*.safetensors*"))
    model = run.unfolded_and_trained(work)
    model.__class__ = UnfoldedForCausalLM
    model.save_pretrained(str(trained))
    shutil.copyfile(work / "unfolded" / "config.json", trained / "config.json")
    del model
    before, after = run.before_and_after()
    entry = {
        "parent": {"name": run.parent.name, "files": file_hashes(sorted(run.parent.glob("*.safetensors")))},
        "source": name,
        "settings": asdict(run.settings),
        "texts": json.loads((work / TEXTS).read_text()),
        "rate": run.rate,
        "trained_parameters": run.num_trained,
        "processes": run.processes.size,
        "steps": run.best_step,
        "tokens": run.best_step * run.made.batch * run.length,
        "before": before,
        "after": after,
        "versions": versions(),
    }
    history = [*provenance.get("healed", []), entry]
    (trained / FILE_NAME).write_text(json.dumps(provenance | {"healed": history}, indent=2) + "\n", encoding="utf-8")
    dtype = str(run.opened.config.get("dtype") or run.opened.config.get("torch_dtype") or "float32")
    fold_into(writer, open_unfolded(trained), text="wikitext", dtype=dtype, device=str(run.where), progress=run.tell)
    card = (run.parent / "README.md").read_text("utf-8") if (run.parent / "README.md").is_file() else ""
    writer.write_text("README.md", card.rstrip() + "\n\n" + _card(entry))
    curve = healing_curve(run.log, run.made.batch * run.length, [part.name for part in run.texts])
    writer.write_json(LOG_FILE, curve)
    write_curve(curve, writer.partial / PLOT_FILE)
    writer.commit()


def _card(entry: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {text} | {entry['before'][text]['recovery']:.1%} | {entry['after'][text]['recovery']:.1%} |"
        for text in entry["after"]
    )
    return f"""## Healed

Distilled from the source on {entry["tokens"]:,} tokens ({entry["settings"]["data"]}), {entry["steps"]:,} steps;
trained: {entry["settings"]["train"]}. Recovery is the perplexity of the source over that of the model, on windows that
were not trained on. `{LOG_FILE}` and `{PLOT_FILE}` are the curves.

| text | before | after |
|---|---:|---:|
{rows}
"""


def _of_recipe(recipe: str | Path | None) -> Path:
    if recipe is None:
        raise RecipeError(
            "there is nothing to heal",
            where="the command",
            why="neither a converted folder nor a recipe was given",
            remedy="transmla heal OUT, or --recipe NAME, whose conversion is then looked for in the working directory",
        )
    path = find_recipe(str(recipe)) or Path(recipe)
    return default_destination(plan(str(load_recipe(path).source), recipe=path))


def _settings(recipe: str | Path | None, source: str) -> Healing:
    """Those of the recipe, or of the installed recipe that converts this source, or the defaults."""
    if recipe is not None:
        return load_recipe(find_recipe(str(recipe)) or Path(recipe)).heal
    for name in list_recipes():
        found = load_recipe(find_recipe(name) or Path(name))
        if source == found.source and name != "smoke":
            return found.heal
    return Healing()


def _check(settings: Healing, device: str) -> None:
    """Refuse what cannot work before anything is loaded."""
    if settings.cached and settings.hidden > 0:
        raise RecipeError(
            "residual streams are not kept on the disk",
            where="hidden and cached",
            why="only the source's largest predictions are",
            remedy="leave out one of the two",
        )
    if settings.heldout < 2:
        raise RecipeError(
            "too few windows are held out",
            where="heldout",
            why="a standard error needs two",
            remedy="hold out 2 windows or more",
        )
    if device not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"healing does not run on {device}",
            where="--device",
            why="several devices are the launcher's business",
            remedy="use cpu or cuda; CUDA_VISIBLE_DEVICES chooses among GPUs",
        )
    if settings.lora is not None and settings.train != "attention":
        raise RecipeError(
            "adapters are put on the attention only",
            where="lora and train",
            why=f"train is {settings.train!r}",
            remedy='leave lora out, or use train = "attention"',
        )


def _fingerprint(parent: Path, source: str, settings: Healing, processes: Processes) -> dict[str, Any]:
    """All that an unfinished run depends on."""
    stamp = [[file.name, file.stat().st_size] for file in sorted(parent.glob("*.safetensors"))]
    others = {"parent": parent.name, "files": stamp, "source": source, "processes": processes.size}
    return asdict(settings) | {"kind": "heal"} | others


def _is_sharded() -> bool:
    """Whether the launcher has asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _shard(model: Any) -> Any:
    """The source's layers over all processes; embeddings and head whole in each."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_decoder().layers:
        fully_shard(layer)
    return model


def _step_of(checkpoint: str | None) -> int:
    """Of a folder checkpoint-STEP."""
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0


def _once(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A resumed run evaluates again where it starts; the first entry of a kind and step counts."""
    kept: dict[tuple[int, bool], dict[str, Any]] = {}
    for entry in log:
        kept.setdefault((int(entry["step"]), "eval_loss" in entry), entry)
    return list(kept.values())
