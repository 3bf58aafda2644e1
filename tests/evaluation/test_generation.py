"""What a model writes, against plain counting and plain forward passes."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import transmla
from transmla.checkpoint.resolve import resolve
from transmla.evaluation.compare import judged
from transmla.evaluation.generation import (
    GRAMS,
    Prompt,
    acceptance,
    compared,
    distinct_share,
    measured,
    predictions_for,
    repeated_share,
    shipped_prompts,
    written,
)
from transmla.evaluation.suite import Suite
from transmla.evaluation.tasks import _groups
from transmla.model.loading import load_tokenizer

STORIES = resolve("stories260k").path


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def other(model: Any) -> Any:
    """The same model, somewhat off."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for weight in changed.model.layers[2].parameters():
            weight.mul_(1.3)
    return changed


def test_repetition_by_hand() -> None:
    assert repeated_share([1, 2, 3, 1, 2], 2) == pytest.approx(1 / 4) and repeated_share([1, 2, 3, 1, 2], 4) == 0
    assert repeated_share([7] * 13, 4) == pytest.approx(0.9) and repeated_share([1], 2) == 0
    assert distinct_share([[1, 2], [1, 2, 3]], 2) == pytest.approx(2 / 3) and distinct_share([[], [1]], 2) == 0


def test_an_end_token_is_no_part_of_the_text() -> None:
    found = measured([[5, 6, 2], [5, 5, 5], [2], []], [2, 9])
    assert found.ended == (1.0, 0.0, 1.0, 0.0) and found.length == (2.0, 3.0, 0.0, 0.0)
    assert found.repeated_2 == (0.0, 0.5, 0.0, 0.0)


def test_differences_are_paired() -> None:
    """Texts whose repetition differs by the same amount from the source's have a difference without an error."""
    source = measured([[1, 2, 3, 4, 5], [1, 2, 1, 2, 1], [1, 1, 1, 1, 1]], [9])
    model = measured([[1, 2, 1, 3, 1], [1, 2, 1, 2, 1], [1, 1, 1, 1, 1]], [9])
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    way = {"greedy": source.plain(tokenizer), "sampled": source.plain(tokenizer)}
    same = compared(way, way)
    assert all(row["difference"] == 0 == row["standard_error"] for row in same["greedy"].values())
    found = compared({"greedy": model.plain(tokenizer), "sampled": way["sampled"]}, way)["greedy"]["distinct_1"]
    texts = [[list(text) for text in one.texts] for one in (source, model)]
    assert found["source"] == pytest.approx(5 / 15) and found["model"] == pytest.approx(3 / 15)
    # leave one out, the textbook's way
    without = [
        distinct_share([t for n, t in enumerate(texts[1]) if n != at], 1)
        - distinct_share([t for n, t in enumerate(texts[0]) if n != at], 1)
        for at in range(3)
    ]
    mean = sum(without) / 3
    assert found["standard_error"] == pytest.approx(math.sqrt(2 / 3 * sum((one - mean) ** 2 for one in without)))
    assert set(compared(way, way)["sampled"]) >= {f"distinct_{size}" for size in GRAMS}


def test_prompts_of_eight_kinds_and_the_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    plain = shipped_prompts(tokenizer)
    assert len(plain) == 32 and len({prompt.kind for prompt in plain}) == 8
    assert all(prompt.ids == tuple(tokenizer(prompt.text).input_ids) for prompt in plain)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    asked = {prompt.text: tokenizer.decode(prompt.ids) for prompt in shipped_prompts(tokenizer)}
    assert asked["Why is the sky blue?"] == "<Why is the sky blue?>A:"
    changed = [one for one, two in zip(plain, shipped_prompts(tokenizer), strict=True) if one.ids != two.ids]
    assert {prompt.kind for prompt in changed} == {"question", "request", "maths"}
    assert max(len(prompt.ids) for prompt in shipped_prompts(tokenizer, 20)) == 20


def test_a_model_accepts_what_it_would_have_written(model: Any, other: Any) -> None:
    prompts = shipped_prompts(AutoTokenizer.from_pretrained(STORIES))[:6]
    for greedy in (True, False):
        texts = written(other, prompts, 20, greedy=greedy).texts
        found = {}
        for name, judge in (("itself", other), ("source", model)):
            own, base = predictions_for(other, prompts, texts), predictions_for(judge, prompts, texts)
            found[name] = acceptance(own, base, texts, greedy=greedy)
        assert found["itself"].value == pytest.approx(1, abs=1e-5)
        shares = []
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([[*prompt.ids, *text]])
            with torch.no_grad():
                p, q = (one(ids).logits[0, len(prompt.ids) - 1 : -1].double().softmax(-1) for one in (model, other))
            same = (p.argmax(-1) == torch.tensor(text)).double()
            shares.append(float((same if greedy else 1 - (p - q).abs().sum(-1) / 2).mean()))
        assert found["source"].values_N == pytest.approx(shares, abs=1e-5) and 0.2 < found["source"].value < 0.97


def test_the_gate_on_loops() -> None:
    """Recovery is what is new in the model's greedy text over what is new in the source's."""
    suite = Suite(gates={"loops": 0.9})
    made: dict[str, Any] = {"texts": {}}
    for repeated, wanted in ((0.28, False), (0.1, True)):
        one, base = ({way: _repeating(share) for way in ("greedy", "sampled")} for share in (repeated, 0.02))
        (gate,) = judged(suite, made | {"generation": one}, made | {"generation": base}, [])
        assert gate.name == "loops" and gate.passed == wanted and gate.found == pytest.approx((1 - repeated) / 0.98)
    (gate,) = judged(suite, made, made, [])
    assert not gate.passed


def test_the_gates_on_needles_and_tasks() -> None:
    """Each length by itself; a task by its first metric."""
    suite = Suite(gates={"needles": 0.9, "tasks": 0.9}, needles=(64, 128), tasks=("piqa",))

    def made(needles: list[float], *tasks: float) -> dict[str, Any]:
        rows = [
            {"task": "piqa", "metric": f"metric {number}", "value": value, "standard_error": 0.1,
             "higher_is_better": True, "values": []}
            for number, value in enumerate(tasks)
        ]  # fmt: skip
        found = {str(size): {"found": share} for size, share in zip((64, 128), needles, strict=True)}
        return {"texts": {}, "needles": found, "tasks": rows}

    gates = judged(suite, made([0.5, 0.95], 0.6, 0.9), made([1.0, 1.0], 0.8, 0.5), [])
    assert {gate.name: gate.found for gate in gates} == {
        "needles 64": 0.5, "needles 128": 0.95, "tasks piqa": pytest.approx(0.75),
    }  # fmt: skip
    assert [gate.passed for gate in gates] == [False, True, False]


def test_the_gate_on_a_group_is_on_its_own_result() -> None:
    """Of its many small parts each is noise; of a group without a result, they are all that there is."""
    suite = Suite(gates={"tasks": 0.9}, tasks=("mmlu",))

    def made(group: str, *shares: float) -> dict[str, Any]:
        names = ["mmlu", *(f"mmlu_{number}" for number in range(1, len(shares)))] if group else ["a", "b"]
        rows = [
            {"task": name, "metric": "acc", "value": share, "standard_error": 0.1, "higher_is_better": True,
             "values": [], "group": group if name != group else ""}
            for name, share in zip(names, shares, strict=True)
        ]  # fmt: skip
        return {"texts": {}, "tasks": rows}

    (gate,) = judged(suite, made("mmlu", 0.95, 0.5, 1.4), made("mmlu", 1.0, 1.0, 1.0), [])
    assert (gate.name, gate.found, gate.passed) == ("tasks mmlu", 0.95, True)
    gates = judged(suite, made("", 0.95, 0.5), made("", 1.0, 1.0), [])
    assert [(gate.name, gate.passed) for gate in gates] == [("tasks a", True), ("tasks b", False)]


def test_parts_of_groups_are_known() -> None:
    """Of groups within groups, and of groups that are names alone."""
    score = {"acc,none": 0.5, "alias": "x"}
    found = {
        "results": {"mmlu": score, "mmlu_stem": score, "physics": score, "tag": {"alias": "tag"}, "one": score},
        "group_subtasks": {"mmlu": ["mmlu_stem"], "mmlu_stem": ["physics"], "tag": ["one"]},
    }
    assert _groups(found) == {"mmlu_stem": "mmlu", "physics": "mmlu"}


def _repeating(share: float) -> dict[str, Any]:
    return {
        "repeated_2": [share] * 3, "repeated_4": [share] * 3, "ended": [0.0] * 3, "length": [4.0] * 3,
        "ids": [[1, 2, 3, 4]] * 3,
    }  # fmt: skip


def test_the_part_of_an_evaluation(tmp_path: Path) -> None:
    """Both write behind the same prompts; a model beside itself differs in nothing and accepts everything."""
    report = transmla.evaluate(
        "stories260k", "stories260k", text="tinystories-valid", windows=2, length=32, generation=10, dtype="float32"
    )
    found = report.plain()
    assert len(found["model"]["generation"]["greedy"]["texts"]) == 32
    assert found["model"]["generation"] == found["source"]["generation"]
    assert found["comparison"]["acceptance"]["greedy"]["value"] == pytest.approx(1, abs=0.02)
    assert found["comparison"]["acceptance"]["sampled"]["value"] == pytest.approx(1, abs=1e-4)
    assert found["comparison"]["generation"]["greedy"]["repeated_4"]["difference"] == 0
    prompt = Prompt(**found["model"]["generation"]["prompts"][0] | {"ids": ()})
    text = found["model"]["generation"]["greedy"]["texts"][0]
    assert text and load_tokenizer("stories260k")(prompt.text).input_ids
