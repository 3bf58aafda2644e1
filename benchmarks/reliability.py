"""The counts of docs/reliability.md, from what tests/conversion/faults.py and tests/checkpoint/test_untrusted.py print.

python -m tests.conversion.faults FOLDER kill:convert:0:1 full:convert:0:1 ... > faults.jsonl
TRANSMLA_FUZZ=8 pytest -s tests/checkpoint/test_untrusted.py > inputs.txt
python benchmarks/reliability.py faults.jsonl inputs.txt
"""

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- counts: benchmarks/reliability.py -->", "<!-- end -->"
WORDS = {
    "kill": "killed", "full": "fails: disk full", "broken": "fails: input/output error",
    "denied": "fails: not permitted",
    "random": "killed at any moment",
}  # fmt: skip


def faults(paths: list[Path]) -> list[str]:
    """A row for each scenario and action."""
    rows, found, heading = [], {}, {}
    for line in (json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()):
        if "action" in line:
            heading = line
            found[heading["scenario"], heading["action"]] = (heading, Counter())
        else:
            wrong = line["again"] not in ("resumed", "was complete") or line["result"].startswith(
                ("traceback", "a wrong")
            )
            found[heading["scenario"], heading["action"]][1]["wrong" if wrong else line["again"]] += 1
    for (scenario, action), (heading, count) in found.items():
        operations = "" if action == "random" else f"{heading['operations']}"
        rows.append(
            f"| {scenario} | {WORDS[action]} | {operations} | {sum(count.values())} | {count['resumed']} | "
            f"{count['was complete']} | {count['wrong']} |"
        )
    return rows


def inputs(path: Path) -> list[str]:
    """A row for each kind of input."""
    (counted,) = re.findall(r"\{'[^{}]*'(?:index\.json|gguf)': \d+[^{}]*\}", path.read_text("utf-8", errors="replace"))
    tried = ast.literal_eval(counted)
    return [f"| {kind} | {number:,} |" for kind, number in sorted(tried.items()) if kind != "none"]


def main(paths: list[str]) -> None:
    lines = [
        "| command | an operation | of all | tried | went on from what was left | was complete | wrong |",
        "|---|---|---:|---:|---:|---:|---:|",
        *faults([Path(path) for path in paths if path.endswith(".jsonl")]),
        "",
        "| input | tried |",
        "|---|---:|",
        *inputs(Path(next(path for path in paths if path.endswith(".txt")))),
    ]
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
