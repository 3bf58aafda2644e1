"""transmla heal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from transmla.cli.frame import (
    NumberRange,
    Scaled,
    as_json,
    command,
    emit,
    errors,
    is_first_process,
    option,
    quiet,
    quiet_libraries,
    rounding_options,
)
from transmla.recipe import BEGIN, MIX, MIX_OF_CHATS, PRECISIONS, TRAINED

_TOKENS = Scaled("count", {"K": 10**3, "M": 10**6, "B": 10**9}, "tokens such as 300000, 300K or 1.5M")


@command(
    "heal",
    "transmla heal OUT",
    "transmla heal OUT HEALED --data wikitext+chat.jsonl:3 --tokens 10M",
    "transmla heal OUT --device cuda --batch 16 --watch wikitext-valid",
    "accelerate launch -m transmla.heal OUT --tokens 100M",
)
@click.argument("model", metavar="[OUT]", required=False)
@click.argument("destination", metavar="[DST]", required=False)
@option(
    "--source",
    metavar="SRC",
    help="Source of the conversion. [default: as OUT's provenance file says]",
    group="Run",
)
@option(
    "--recipe",
    metavar="R",
    help="Recipe whose table [heal] is used, by name or file. [default: the recipe of SRC, if any]",
    group="Run",
)
@option(
    "--data",
    metavar="MIX",
    help="Text to train on; A:3+B mixes three to one. FILE (.txt; .jsonl, .parquet, .csv with `text`, chat "
    "`messages`, or `prompt` and `completion`), dataset id OWNER/NAME[:CONFIG][@SPLIT], wikitext, synthetic, "
    f"continued, code, maths, stories, self (SRC writes it). [default: {MIX}, of a model with a chat template "
    f"{MIX_OF_CHATS}]",
    group="Text",
)
@option(
    "--tokens",
    type=_TOKENS,
    metavar="N",
    help="Total training tokens, for example 300K or 100M. [default: 1M; a recipe of SRC may want 100M]",
    group="Text",
)
@option(
    "--distinct",
    type=_TOKENS,
    metavar="N",
    help="Distinct tokens; they repeat after that. [default: all]",
    group="Text",
)
@option(
    "--window",
    type=click.IntRange(min=8),
    metavar="N",
    help="Tokens per window. [default: 1024]",
    group="Text",
)
@option(
    "--begin",
    type=click.Choice(BEGIN),
    help="Windows of plain texts that start with the begin token, where the tokenizer puts one first; rows of tables "
    "always do. [default: none]",
    group="Text",
)
@option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Windows per step. [default: a 400th of all, between 1 and 64]",
    group="What is trained",
)
@option(
    "--micro",
    type=click.IntRange(min=1),
    metavar="N",
    help="Windows that a device processes at once. [default: 1]",
    group="What is trained",
)
@option(
    "--rate",
    type=NumberRange(min=0, min_open=True),
    metavar="X",
    help="Largest step, relative to the weights that it changes. [default: 5e-4, for small models 1e-2]",
    group="What is trained",
)
@option(
    "--train",
    type=click.Choice(TRAINED),
    help="Weights that are trained. [default: attention]",
    group="What is trained",
)
@option(
    "--rate-rest",
    type=NumberRange(min=0, min_open=True),
    metavar="X",
    help="The same outside the attention, with --train all. [default: 0.3 of --rate]",
    group="What is trained",
)
@option(
    "--layerwise",
    type=NumberRange(0, 1),
    metavar="SHARE",
    help="Share of the steps, the first, in which each layer learns for itself from SRC's input of it. [default: 0]",
    group="Objective",
)
@option(
    "--teacher",
    metavar="MODEL",
    help="Distil a larger model with SRC's tokenizer in its place; SRC stays what held-out text is compared with.",
    group="Objective",
)
@option(
    "--on-policy",
    type=NumberRange(0, 1),
    metavar="SHARE",
    help="Share of the windows that are replaced by what the model itself writes behind beginnings of the text; SRC "
    "says how it would go on. Against loops. [default: 0]",
    group="Text",
)
@option(
    "--on-policy-tokens",
    type=click.IntRange(min=8),
    metavar="N",
    help="Most tokens that it writes behind a prompt, usually 64 to 256. [default: 128]",
    group="Text",
)
@option(
    "--resample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Steps between two such writings. [default: 25]",
    group="Text",
)
@option(
    "--completion-only",
    is_flag=True,
    default=None,
    help="Learn only the answers of rows with `messages`, or with `prompt` and `completion`; other text counts whole.",
    group="Text",
)
@option(
    "--long-share",
    type=NumberRange(0, 1),
    metavar="SHARE",
    help="Share of the tokens, the last, that come in windows of --long-window; the rate rises again for them. "
    "[default: 0]",
    group="Text",
)
@option(
    "--long-window",
    type=click.IntRange(min=8),
    metavar="N",
    help="Tokens of these windows. [default: 4096]",
    group="Text",
)
@option(
    "--lora",
    type=click.IntRange(min=1),
    metavar="R",
    help="Train adapters of rank R, merged at the end.",
    group="What is trained",
)
@rounding_options("Objective")
@option(
    "--temperature",
    type=NumberRange(min=0, min_open=True),
    metavar="T",
    help="Temperature of the KL divergence. [default: 1]",
    group="Objective",
)
@option(
    "--cross-entropy",
    type=NumberRange(0, 1),
    metavar="X",
    help="Weight of the cross-entropy with the text. [default: 0]",
    group="Objective",
)
@option(
    "--hidden",
    type=NumberRange(min=0),
    metavar="X",
    help="Weight of the error of the residual streams. [default: 0]",
    group="Objective",
)
@option(
    "--top-k",
    type=click.IntRange(min=1),
    metavar="K",
    help="Compare only SRC's K likeliest tokens. [default: all, with --cached 64]",
    group="Objective",
)
@option(
    "--cached",
    is_flag=True,
    default=None,
    help="Compute SRC's top-k predictions once and keep them on disk.",
    group="Objective",
)
@option(
    "--heldout",
    type=click.IntRange(min=2),
    metavar="N",
    help="Held-out windows of each text. [default: 8]",
    group="Text",
)
@option(
    "--watch",
    metavar="TEXTS",
    help="Further texts to measure on, such as wikitext-valid+FILE.",
    group="Text",
)
@option(
    "--evaluations",
    type=click.IntRange(min=1),
    metavar="N",
    help="Times that the model is measured and saved. [default: 10]",
    group="Run",
)
@option(
    "--patience",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop after N measurements without a gain. [default: never]",
    group="Run",
)
@option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Precision of matrix products; auto: bfloat16 where the device multiplies it, float32 where not. "
    "[default: auto]",
    group="Machine",
)
@option(
    "--checkpointing",
    is_flag=True,
    default=None,
    help="Recompute activations: less memory, a third more time.",
    group="Machine",
)
@option(
    "--compile",
    is_flag=True,
    default=None,
    help="Run layers and loss through torch.compile.",
    group="Machine",
)
@option(
    "--seed",
    type=int,
    help="Seed for the order of the data. [default: 0]",
    group="Text",
)
@option(
    "--device",
    type=click.Choice(("cpu", "cuda", "auto")),
    default="auto",
    help="Where to compute; auto: a GPU if there is one. Of several, CUDA_VISIBLE_DEVICES chooses.",
    group="Machine",
)
@option(
    "--restart",
    is_flag=True,
    help="Delete an unfinished run to DST instead of resuming it.",
    group="Run",
)
@as_json
@quiet
def heal_command(model: str | None, destination: str | None, json_file: str | None, quiet: bool, **given: Any) -> None:
    """Distil SRC's predictions into the converted folder OUT; writes DST, a folder of the same kind.

    DST defaults to OUT-healed and is never overwritten; OUT stays as it is, and with --recipe defaults to the
    folder that `convert` of that recipe writes in this directory. The best of all measured states is kept: the
    nearest to SRC on average over the measured texts, and on none of them further from it than OUT by more than the
    error. A run that was killed resumes when the same command is given again. On several processes or GPUs (DDP or
    FSDP2, as accelerate is configured): accelerate launch -m transmla.heal OUT ...
    """
    with errors():
        import transmla

        quiet_libraries(bars=not quiet)
        from rich.console import Console

        from transmla.cli.progress import progress
        from transmla.healing.show import show_healing

        with progress(quiet or not is_first_process()) as update:
            report = transmla.heal(model, destination, progress=update, **given)
        if is_first_process():
            emit(lambda: asdict(report), json_file, lambda: show_healing(report, Console()))
