"""Train a converted model with TRL's SFTTrainer, the right way round: unfold, train, fold.

    pip install trl datasets
    python examples/heal_with_trl.py OUT HEALED [--data rows.jsonl] [--steps 100] [--rate 1e-4] [--length 256]

OUT is a folder that `transmla convert` has written. Training it as it is would wreck it, as its latent rows are about
1e-5.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib import resources
from pathlib import Path

from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

import transmla


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--data", help="a .jsonl file with a column `text`; default: a text that ships")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        train, trained = Path(folder) / "train", Path(folder) / "trained"
        transmla.unfold(arguments.model, train, dtype="float32")
        transmla.register()
        settings = SFTConfig(
            output_dir=folder, max_steps=arguments.steps, learning_rate=arguments.rate, max_length=arguments.length,
            per_device_train_batch_size=4, logging_steps=max(1, arguments.steps // 10), report_to="none", bf16=False,
        )  # fmt: skip
        trainer = SFTTrainer(model=transmla.load(train), args=settings, train_dataset=rows(arguments.data),
                             processing_class=tokenizer(train))  # fmt: skip
        trainer.train()
        trainer.save_model(str(trained))
        keep(train, trained)
        print(transmla.fold(trained, arguments.destination))


def rows(data: str | None) -> Dataset:
    if data is not None:
        return load_dataset("json", data_files=data, split="train")
    text = (resources.files("transmla.data") / "stories.txt").read_text("utf-8")
    pieces = [piece.strip() for piece in text.split("\n\n") if piece.strip()]
    return Dataset.from_dict({"text": pieces[:2000]})


def tokenizer(folder: Path) -> object:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def keep(train: Path, trained: Path) -> None:
    """What a trainer does not write: the provenance, and the config as it was."""
    for name in ("transmla.json", "config.json"):
        (trained / name).write_bytes((train / name).read_bytes())


if __name__ == "__main__":
    main()
