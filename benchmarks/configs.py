"""What `transmla plan` says of published models, from their config.json alone.

    python benchmarks/configs.py FOLDER [--out DIR]

FOLDER holds files ORG--NAME.json, each the config.json of a model as it was published. Of each, a checkpoint is made
that has headers but no values (a sparse file of full size), and planned with the defaults. Writes configs.json and
configs.md into DIR: the sizes and the form, or the reason of the refusal. Nothing is downloaded or loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import transmla
from tests.families import sparse_source
from transmla.errors import TransmlaError


def planned(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Sizes and form, or what was refused and why."""
    try:
        found = transmla.plan(str(sparse_source(folder / "model", config)))
    except TransmlaError as error:
        return {"refused": error.what, "why": error.why}
    return {
        "form": found.form,
        "before": found.gqa.cache_values(),
        "after": found.mla.cache_values(),
        "size": f"{found.mla.kv_lora_rank}+{found.mla.qk_rope_head_dim}",
        "obstacles": list(found.obstacles),
        "memory_gib": round(found.memory_bytes / 2**30, 1),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | model_type | result | |", "|---|---|---|---|"]
    for name, row in rows.items():
        if "refused" in row:
            lines.append(f"| {name} | {row['model_type']} | refused | {row['why']} |")
        else:
            result = f"{row['before']:,} -> {row['after']} values ({row['size']})"
            note = row["form"] + (": " + "; ".join(row["obstacles"]) if row["obstacles"] else "")
            lines.append(f"| {name} | {row['model_type']} | {result} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "configs")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(arguments.folder.glob("*.json")):
        config = json.loads(path.read_text("utf-8"))
        with tempfile.TemporaryDirectory() as folder:
            name = path.stem.replace("--", "/")
            rows[name] = {"model_type": config.get("model_type")} | planned(config, Path(folder))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "configs.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    head = (
        "# What `transmla plan` says of published models\n\n"
        "Written by `benchmarks/configs.py` with the defaults, from config.json alone: weights are taken to be "
        "bfloat16 where the\nconfig does not say that they are packed.\n\n"
    )
    (arguments.out / "configs.md").write_text(head + table(rows), encoding="utf-8")
    counts = sum("refused" in row for row in rows.values())
    print(f"{len(rows)} configs: {len(rows) - counts} planned, {counts} refused; {arguments.out / 'configs.md'}")


if __name__ == "__main__":
    main()
