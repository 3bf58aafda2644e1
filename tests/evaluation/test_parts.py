"""The parts of an evaluation against plain loops: agreement, positions, tasks, greedy text."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transmla.checkpoint.resolve import resolve
from transmla.errors import DataError
from transmla.evaluation import tasks
from transmla.evaluation.agreement import agreement, predictions
from transmla.evaluation.generation import acceptance, predictions_for, shipped_prompts
from transmla.evaluation.perplexity import perplexity
from transmla.evaluation.positions import by_position, edges_up_to
from transmla.evaluation.smoke import repeated_share, smoke
from transmla.evaluation.tasks import TaskResult, recoveries, run_tasks

STORIES = resolve("stories260k").path
IDS = torch.randint(3, 512, (3, 90), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def other(model: Any) -> Any:
    """The same model, somewhat off."""
    changed = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in changed.model.layers[2].parameters():
            weight.mul_(1.3)
    return changed


def test_agreement_equals_plain_loops(model: Any, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transmla.evaluation.agreement.CHUNK", 37)
    found = agreement(predictions(other, IDS), predictions(model, IDS))
    with torch.no_grad():
        p, q = (one(IDS).logits.double().log_softmax(-1) for one in (model, other))
    divergence = (p.exp() * (p - q)).sum(-1).mean(1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    assert found.kl.values_N == pytest.approx(divergence.tolist(), rel=1e-4)
    assert found.top1.values_N == pytest.approx(same.tolist()) and found.kl.value > 0.01
    assert found.kl.standard_error == pytest.approx(float(divergence.std()) / math.sqrt(3), rel=1e-4)
    itself = agreement(predictions(model, IDS), predictions(model, IDS))
    assert itself.kl.value == pytest.approx(0, abs=1e-6) and itself.top1.value == 1


def test_rows_without_a_token_are_not_compared(model: Any) -> None:
    """Vocabularies of one family are padded to different sizes."""
    padded = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    padded.resize_token_embeddings(576)
    with torch.no_grad():
        padded.get_output_embeddings().weight[512:] = 3.0
    for pair in ((padded, model), (model, padded)):
        found = agreement(*(predictions(one, IDS) for one in pair))
        assert found.kl.value == pytest.approx(0, abs=1e-6) and found.top1.value == 1
    prompts, texts = shipped_prompts(AutoTokenizer.from_pretrained(STORIES))[:2], [[5, 6, 7], [8]]
    judged = [predictions_for(one, prompts, texts) for one in (padded, model)]
    assert acceptance(*judged, texts, greedy=False).value == pytest.approx(1, abs=1e-5)


def test_positions_average_to_the_perplexity(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transmla.evaluation.positions.EDGES", (0, 16, 32, 64))
    monkeypatch.setattr("transmla.train.losses.ROWS_ON_CPU", 25)
    found = by_position(model, IDS)
    assert found.edges == (0, 16, 32, 64, 90)
    # the last position has no label
    weights = torch.tensor([16.0, 16, 32, 25]) / 89
    nats = torch.tensor(found.nats_NR) @ weights
    assert nats.tolist() == pytest.approx(perplexity(model, IDS).nats_N, rel=1e-5)
    logits = model(IDS).logits.detach()
    second = torch.nn.functional.cross_entropy(logits[:, 16:32].flatten(0, 1), IDS[:, 17:33].flatten())
    assert found.perplexities[1] == pytest.approx(math.exp(second), rel=1e-5)
    later = by_position(model, IDS, unscored=3)
    first = torch.nn.functional.cross_entropy(logits[:, 2:16].flatten(0, 1), IDS[:, 3:17].flatten())
    assert later.perplexities == (pytest.approx(math.exp(first), rel=1e-5), *found.perplexities[1:])


def test_ranges_double_up_to_the_context() -> None:
    monkey = edges_up_to(8192)
    assert monkey == (0, 512, 1024, 2048, 4096, 8192)
    assert edges_up_to(3000) == (0, 512, 1024, 2048, 3000) and edges_up_to(300) == (0, 300)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of six documents with two choices each."""
    folder = tmp_path_factory.mktemp("tasks")
    pairs = [
        ("Once upon a", " time", " fish"), ("Lily was very", " happy", " the"), ("The dog ran to the", " park", " was"),
        ("They played all", " day", " cat"), ("She said", ' "Hi"', " of"), ("He went to", " bed", " ever after"),
    ]  # fmt: skip
    rows = [
        {"query": query, "choices": [right, wrong][:: 1 if number % 2 else -1], "gold": 0 if number % 2 else 1}
        for number, (query, right, wrong) in enumerate(pairs)
    ]
    data = folder / "tiny.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "tiny.yaml").write_text(f"""task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
""")
    (folder / "lost.yaml").write_text((folder / "tiny.yaml").read_text().replace("tiny", "lost"))
    return folder


@pytest.fixture
def only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own tasks, whose index takes a quarter of a minute to build."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    tasks._indexed.cache_clear()


@pytest.mark.usefixtures("only_own_tasks")
@pytest.mark.filterwarnings("ignore")
def test_task_equals_plain_scoring(
    model: Any,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    from lm_eval import simple_evaluate

    def loud(*args: Any, **kwargs: Any) -> Any:
        print("Determined largest batch size: 4")  # as lm-eval does where it looks for it
        return simple_evaluate(*args, **kwargs)

    monkeypatch.setattr("lm_eval.simple_evaluate", loud)
    found = {one.metric: one for one in run_tasks(model, tokenizer, ["tiny_choices"], include_path=str(task_folder))}
    printed = capsys.readouterr()
    assert "largest batch" in printed.err and not printed.out, "stdout is for --json"
    right = []
    for row in map(json.loads, (task_folder / "tiny.jsonl").read_text().splitlines()):
        scores = []
        for choice in row["choices"]:
            whole, context = (tokenizer(text).input_ids for text in (row["query"] + choice, row["query"]))
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[at - 1, whole[at]]) for at in range(len(context), len(whole))))
        right.append(float(scores.index(max(scores)) == row["gold"]))
    assert found["acc"].values == tuple(right) and found["acc"].value == pytest.approx(sum(right) / 6)
    assert sum(right) >= 4, "a model of stories finishes stories"
    assert found["acc"].higher_is_better and found["acc"].standard_error > 0


@pytest.mark.usefixtures("only_own_tasks")
@pytest.mark.filterwarnings("ignore")
def test_task_equals_the_command_line_of_lm_eval(
    model: Any, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={STORIES},dtype=float32",
        "--tasks", "tiny_choices", "--include_path", str(task_folder), "--device", "cpu", "--batch_size", "8",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    # its table has arrows in it, which not every locale can print
    subprocess.run(command, check=True, capture_output=True, timeout=240, env=os.environ | {"PYTHONUTF8": "1"})
    (written,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]["tiny_choices"]
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    ours = run_tasks(model, tokenizer, ["tiny_choices"], include_path=str(task_folder))
    assert {one.metric for one in ours} == {"acc", "acc_norm"}
    for one in ours:
        assert one.value == theirs[f"{one.metric},none"]
        assert one.standard_error == theirs[f"{one.metric}_stderr,none"]


@pytest.mark.usefixtures("only_own_tasks")
@pytest.mark.filterwarnings("ignore")
def test_tasks_that_are_not_there(
    model: Any, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    with pytest.raises(DataError, match=r"did you mean .*tiny_choices"):
        run_tasks(model, tokenizer, ["tiny_choice"], include_path=str(task_folder))
    with pytest.raises(DataError, match="data of a task cannot be read"):
        run_tasks(model, tokenizer, ["lost_choices"], include_path=str(task_folder))
    broken = (task_folder / "tiny.yaml").read_text().replace(str(task_folder), str(tmp_path))
    (tmp_path / "broken.yaml").write_text(broken.replace("tiny", "broken"))
    (tmp_path / "broken.jsonl").write_text('{"query": "Once", "choices": [" a"], "gold": 0}\n{"query": "Once" " "}\n')
    assert list(tasks.check_tasks(["broken_choices"], str(tmp_path))) == ["broken_choices"]
    with pytest.raises(DataError, match="data of a task cannot be read"):
        run_tasks(model, tokenizer, ["broken_choices"], include_path=str(tmp_path))


@pytest.mark.usefixtures("only_own_tasks")
@pytest.mark.filterwarnings("ignore")
def test_tasks_that_build_their_texts_with_the_tokenizer(
    model: Any, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As RULER's do: they are not refused before the tokenizer is there, and get the one that is loaded."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "made.py").write_text("""import datasets
from lm_eval.tasks.ruler.common_utils import get_tokenizer, resolve_tokenizer_name

def built(**kwargs):
    tokenizer = get_tokenizer(resolve_tokenizer_name(kwargs))
    rows = [{"query": tokenizer.decode(tokenizer("Once upon a").input_ids, skip_special_tokens=True),
             "choices": [" time", " fish"], "gold": 0}]
    return {"test": datasets.Dataset.from_list(rows)}

def needs_more(**kwargs):
    import a_package_that_is_not_there
""")
    task = (task_folder / "tiny.yaml").read_text().splitlines()
    task = [line for line in task if not line.startswith("dataset_kwargs")]
    for name, function in (("built_choices", "built"), ("more_choices", "needs_more")):
        lines = [*task, f"custom_dataset: !function made.{function}"]
        lines = [line.replace("tiny_choices", name).replace("dataset_path: json", 'dataset_path: ""') for line in lines]
        (tmp_path / f"{name}.yaml").write_text("\n".join(lines))
    missing = tasks.check_tasks(["built_choices", "more_choices"], str(tmp_path))
    assert list(missing) == ["more_choices"] and "transmla[needles]" in str(missing["more_choices"])
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    found = {
        one.metric: one.value for one in run_tasks(model, tokenizer, ["built_choices"], include_path=str(tmp_path))
    }
    assert found["acc"] == 1.0


def test_the_index_of_tasks_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Index(SimpleNamespace):
        def load(self, name: str) -> None:
            raise FileNotFoundError(name)

    def built(include_path: str | None, metadata: dict[str, Any] | None) -> Index:
        builds.append((include_path, metadata))
        return Index(all_tasks=["one"])

    builds: list[Any] = []
    monkeypatch.setattr("lm_eval.tasks.TaskManager", built)
    folder, file = str(tmp_path), tmp_path / "one.yaml"
    for _ in range(2):
        assert list(tasks.check_tasks(["one"], folder)) == ["one"]
    assert builds == [(folder, tasks.TOKENIZER)]
    file.write_text("task: one")
    tasks.check_tasks(["one"], folder)
    os.utime(file, ns=(1, 1))
    for _ in range(2):
        tasks.check_tasks(["one"], folder)
    assert builds == [(folder, tasks.TOKENIZER)] * 3


def test_recovery_and_its_paired_error() -> None:
    base = TaskResult("piqa", "acc", 0.8, 0.2, True, (1.0, 1.0, 1.0, 1.0, 0.0))
    own = TaskResult("piqa", "acc", 0.6, 0.2, True, (1.0, 1.0, 1.0, 0.0, 0.0))
    (found,) = recoveries([own], [base])
    assert (found.recovery, found.difference) == (pytest.approx(0.75), pytest.approx(-0.2))
    # one of five differs: deviation sqrt(0.2) of the differences, over sqrt(5)
    assert found.standard_error == pytest.approx(math.sqrt(0.2 / 5))
    worse = TaskResult("lambada", "perplexity", 20.0, 1.0, False, ())
    (found,) = recoveries([worse], [TaskResult("lambada", "perplexity", 10.0, 1.0, False, ())])
    assert found.recovery == pytest.approx(0.5) and math.isnan(found.standard_error)
    assert recoveries([own], []) == []
    # values in nats, aggregated to a perplexity: their differences are no error of it
    nats = TaskResult("lambada", "perplexity", 20.0, 1.0, False, (-2.0, -4.0))
    (found,) = recoveries([nats], [TaskResult("lambada", "perplexity", 10.0, 1.0, False, (-2.0, -2.0))])
    assert found.difference == 10 and math.isnan(found.standard_error)


def test_answers_that_are_read_in_two_ways_are_two_metrics() -> None:
    """As GSM8K's are; each is compared with itself, over its own documents."""

    def answers(strict: list[float], flexible: list[float]) -> list[TaskResult]:
        named = {"strict-match": strict, "flexible-extract": flexible}
        row = {f"exact_match,{kind}": sum(values) / len(values) for kind, values in named.items()}
        samples = [{"filter": kind, "exact_match": one} for kind, values in named.items() for one in values]
        better = {"gsm8k": {"exact_match": True}}
        return tasks._results({"results": {"gsm8k": row}, "samples": {"gsm8k": samples}, "higher_is_better": better})

    own = answers([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    assert [(one.metric, one.values) for one in own] == [
        ("exact_match,strict-match", (1.0, 0.0, 0.0, 0.0)),
        ("exact_match,flexible-extract", (1.0, 1.0, 1.0, 1.0)),
    ]
    for found in recoveries(own, own):
        assert (found.recovery, found.difference, found.standard_error) == (1, 0, 0)
    plain = tasks._results({"results": {"piqa": {"acc,none": 0.5}}, "samples": {"piqa": [{"acc": 1}, {"acc": 0}]}})
    assert [(one.metric, one.values) for one in plain] == [("acc", (1.0, 0.0))]


def test_haystacks_are_built_with_the_loaded_tokenizer(tmp_path: Path) -> None:
    """lm-eval would load it by name, and run the code that lies in the folder."""
    ruler = pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    loader, tokenizer = ruler.AutoTokenizer, AutoTokenizer.from_pretrained(STORIES)
    for made in (tokenizer, AutoTokenizer.from_pretrained(STORIES)):
        with tasks._with_tokenizer(made):
            assert ruler.get_tokenizer("a-name") is made
    assert ruler.AutoTokenizer is loader


def test_repetition_and_emptiness(model: Any) -> None:
    assert repeated_share([1, 2, 3, 4, 5]) == 0 and repeated_share([1]) == 0
    assert repeated_share([7] * 13) == pytest.approx(0.9)
    found = smoke(model, AutoTokenizer.from_pretrained(STORIES), ("Once upon a time",), max_new_tokens=20)
    assert found.num_empty == 0 and found.continuations[0].num_tokens == 20 and 0 <= found.repeated < 0.5


def test_needles_of_every_length_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As lm-eval has them: 500 documents of the first length, 500 of the next, -1 for lengths that are not met."""

    def run_tasks(*_: Any, limit: int, max_length: int, metadata: dict[str, Any], **__: Any) -> list[TaskResult]:
        documents = [length for length in metadata["max_seq_lengths"] for _ in range(500)][:limit]
        assert max_length > max(documents)
        met = {length: documents.count(length) for length in (4096, *documents)}
        return [
            TaskResult("niah", str(length), 0.75 if count else -1.0, math.nan, True, ())
            for length, count in met.items()
        ]

    monkeypatch.setattr(tasks, "run_tasks", run_tasks)
    error = math.sqrt(0.75 * 0.25 / 12)
    for lengths in ([1024, 4096], [4096, 1024], [2048]):
        assert tasks.needles(None, None, "name", lengths, 12) == dict.fromkeys(lengths, (0.75, error))
