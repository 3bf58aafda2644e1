"""Names of strangers stay names: in report pages, in cards, in the templates of tokenizers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import transmla
from tests.evaluation.test_report import TEXT, result
from tests.families import MakeSource
from transmla.conversion.card import shown
from transmla.errors import DataError
from transmla.text.chats import rendered

__all__ = ["result"]  # the fixture

EVIL = "<script>alert(1)</script> \"'`|\n# $\\frac{ {{ 7*191 }} {% raw %}"
TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch ' + messages[0].content) }}",
    "attributes": "{% set x = messages.append(1) %}{{ messages.__class__.__base__ }}",
    "ranges": "{% for i in range(10**9) %}x{% endfor %}",
    "damaged": "{% for",
}


def named(value: Any) -> Any:
    """All names of a result, and the text in it, as somebody might call them."""
    if isinstance(value, dict):
        return {EVIL if key == TEXT else key: named(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [named(inner) for inner in value]
    return EVIL if value in ("mla", "<source>", "piqa", "Once", " upon & a time") else value


def test_a_page_shows_names_and_runs_nothing(result: Path, tmp_path: Path) -> None:
    content = named(json.loads(result.read_text()))
    path = tmp_path / "a $x{ <b>.json"
    path.write_text(json.dumps(content))
    page = transmla.report([path], tmp_path / "page.html", pictures=tmp_path / "pictures").read_text()
    assert "<script>" not in page and "1337" not in page and "&lt;script&gt;" in page
    assert len(list((tmp_path / "pictures").iterdir())) > 2


def test_results_nested_beyond_reason(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="not a result file"):
        transmla.report([tmp_path / "deep.json"], tmp_path / "page.html")


def test_a_card_shows_names(lively: MakeSource, text_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "<img src=x onerror=alert(1)> | `a`"
    shutil.copytree(lively(), source)
    transmla.convert(
        str(source), tmp_path / "out", latent=12, rope=4, refine="off", calibration=str(text_file), tokens=128,
        window=32, theta=100.0,
    )  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<img" not in card and "\n# &lt;img src=x onerror=alert(1)&gt; \\| 'a', converted" in card
    assert shown(EVIL).count("\n") == 0 and "<" not in shown(EVIL)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_stay_in_their_sandbox(lively: MakeSource, tmp_path: Path, template: str) -> None:
    from transmla.model.loading import load_tokenizer

    words = load_tokenizer(lively())
    words.chat_template = TEMPLATES[template]
    target = tmp_path / "touched"
    with pytest.raises(DataError, match="the chat template of the tokenizer fails"):
        rendered({"messages": [{"role": "user", "content": str(target)}]}, words, "rows")
    assert not target.exists()
