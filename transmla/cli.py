"""The command line. Only click is imported here; everything else is imported inside the commands, so that
`transmla --help` answers at once. Every command is one documented Python call."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from transmla.errors import GateError, TransmlaError

EPILOG = (
    "Exit codes: 0 done, 2 usage, 3 source unreadable, 4 model not supported, 5 over budget or gate missed, "
    "6 impossible geometry, 7 text missing or too short, 8 destination, 9 verification failed, 10 recipe or suite, "
    "130 interrupted, 1 anything else."
)
REFINE_LEVELS = ("off", "fast", "full")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# those of checkpoint/write_gguf.py, which must not be imported for --help
GGUF_TYPES = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "iq4_nl", "q3_k_l",
    "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip


def _option(*names: str, **kwargs: Any) -> Callable[[Any], Any]:
    return click.option(*names, show_default=True, **kwargs)


def _geometry_options(command: Any) -> Any:
    for option in (
        _option("--recipe", metavar="R", help="Recipe: name of an installed one, or a TOML file."),
        _option(
            "--rope",
            type=int,
            metavar="DIM",
            help="qk_rope_head_dim: cached rotary values per token and layer, even. [default: by model, see `plan`]",
        ),
        _option(
            "--q-latent",
            type=int,
            metavar="RANK",
            help="q_lora_rank: queries through a latent of their own, as in DeepSeek-V3. [default: none]",
        ),
        _option(
            "--budget",
            metavar="X%",
            help="With --latent auto: perplexity on held-out calibration text that the conversion may cost.",
        ),
        _option(
            "--latent",
            metavar="RANK",
            help="kv_lora_rank: cached latent values per token and layer; auto: the smallest within --budget. "
            "[default: the largest engine-friendly size that saves at least half of the cache]",
        ),
    ):
        command = option(command)
    return command


_device = _option("--device", default="cpu", metavar="DEVICE", help="Where to compute: cpu, cuda or cuda:1.")


@contextmanager
def _errors() -> Iterator[None]:
    """Expected errors as one message and their exit code; everything else keeps its traceback."""
    try:
        yield
    except TransmlaError as error:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        from transmla.evaluation.speed import ran_out_of_memory

        if not ran_out_of_memory(error):
            raise
        click.echo(f"{click.style('error:', fg='red', bold=True)} {_out_of_memory(error)}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo(
            "interrupted; nothing is half-written, and the same command continues a conversion",
            err=True,
        )
        sys.exit(130)


def _out_of_memory(error: Exception) -> TransmlaError:
    return TransmlaError(
        "out of memory",
        where="the device",
        why=(str(error).splitlines() or [type(error).__name__])[0],
        remedy="use --device cpu, a smaller --dtype or shorter windows (--length, --window); of a conversion, fewer "
        "--tokens, --offload or --block-layers",
    )


def _quiet_libraries() -> None:
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch", "gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="transmla", prog_name="transmla")
def main() -> None:
    """Retrofit multi-head latent attention (MLA) onto pretrained GQA, MHA and MQA language models.

    SRC is a Hugging Face folder, a .gguf file, a hub id, the name of a recipe, or stories260k (a 1 MB model
    that ships with the program).
    """


@main.command("plan", epilog=EPILOG)
@click.argument("source", metavar="SRC")
@_geometry_options
@_option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def plan_command(source: str, as_json: bool, **given: Any) -> None:
    """Say what `convert` would do, from file headers alone: geometry, cache, memory, disk, engines."""
    with _errors():
        import transmla

        _quiet_libraries()
        found = transmla.plan(source, **_sizes(given))
        if as_json:
            click.echo(json.dumps(found.summary(), indent=2))
            return
        from rich.console import Console

        from transmla.display import show_plan

        show_plan(found, Console())


@main.command("convert", epilog=EPILOG)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="[DST]", required=False)
@_geometry_options
@_option(
    "--calibration",
    metavar="TEXT",
    help="Calibration text: FILE (.txt; .jsonl, .parquet, .csv with a `text` column), dataset id OWNER/NAME[:CONFIG], "
    "wikitext or synthetic (both ship with the program) or self (sampled from SRC); A+B: shares of both. "
    "[default: wikitext+synthetic]",
)
@_option(
    "--refine",
    type=click.Choice(REFINE_LEVELS),
    help="Gradient refinement on the calibration tokens after the closed form: off, fast or full (several passes). "
    "[default: fast]",
)
@_option(
    "--tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Calibration tokens in all. [default: 131072, with --refine full 245760]",
)
@_option(
    "--sampled",
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens more, which SRC itself writes as continuations of the text; needs SRC in memory. [default: 0]",
)
@_option("--window", type=click.IntRange(min=8), metavar="N", help="Tokens per calibration window. [default: 1024]")
@_option(
    "--theta",
    metavar="X",
    help="rope_theta of the result; auto tries a few on a few layers and measures. [default: auto]",
)
@_option("--dtype", type=click.Choice(DTYPES), help="Of the written weights; auto: as in SRC. [default: auto]")
@_device
@_option("--seed", type=int, help="Of sampled calibration text. [default: 0]")
@_option(
    "--offload",
    type=click.FloatRange(min=0),
    metavar="GIB",
    help="Calibration activations beyond GIB go into a file beside DST. [default: half of the free memory]",
)
@_option(
    "--block-layers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Layers that are refined together at the end. [default: all that fit into half of the free memory]",
)
@_option("--restart", is_flag=True, help="Delete an unfinished conversion to DST instead of going on with it.")
@_option("--dry-run", is_flag=True, help="Only show the plan, with the checks of DST.")
@_option("-q", "--quiet", is_flag=True, help="No progress bars.")
def convert_command(
    source: str,
    destination: str | None,
    dry_run: bool,
    quiet: bool,
    device: str,
    offload: float | None,
    block_layers: int | None,
    restart: bool,
    **given: Any,
) -> None:
    """Convert SRC and write DST: one folder for transformers, with or without remote code, and other engines.

    DST defaults to NAME-mla-LATENT-ROPE in the working directory and is never overwritten. It appears only when all
    of it is written and the stock deepseek_v3 class computes from it what was converted. A conversion that was
    interrupted or killed keeps its finished layers in DST.partial; the same command goes on from there.
    """
    with _errors():
        import transmla

        _quiet_libraries()
        from rich.console import Console

        from transmla.display import progress, show_conversion, show_plan

        given["theta"] = _number(given["theta"], "--theta")
        _sizes(given)
        console = Console()
        if dry_run:
            from transmla.conversion import default_destination

            planned = transmla.plan(source, **given)
            target = destination or default_destination(planned)
            show_plan(transmla.plan(source, target, **given), console)
            console.print(f"would write {target}", highlight=False)
            return
        with progress(quiet or not _first_process()) as update:
            report = transmla.convert(
                source,
                destination,
                device=device,
                progress=update,
                offload=offload,
                block_layers=block_layers,
                restart=restart,
                **given,
            )
        if _first_process():
            show_conversion(report, _peak_memory(), console)


@main.command("eval", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@_option("--against", metavar="SRC", help="The source, or any model with the same tokenizer, measured beside it.")
@_option(
    "--suite",
    metavar="SUITE",
    help="quick (minutes), standard, full (hours on a CPU), or a TOML file. [default: perplexity and cache bytes]",
)
@_option(
    "--text",
    multiple=True,
    metavar="TEXT",
    help="FILE, dataset id, wikitext-valid or tinystories-valid; repeatable. [default: of the suite or the recipe]",
)
@_option("--windows", type=click.IntRange(min=1), metavar="N", help="Windows of each text. [default: 16]")
@_option("--length", type=click.IntRange(min=2), metavar="N", help="Tokens per window. [default: 1024, or the context]")
@_option("--tasks", metavar="A,B", help="Tasks of lm-eval, separated by commas.")
@_option("--include-path", metavar="DIR", help="Folder of more lm-eval task files.")
@_option("--limit", type=click.IntRange(min=1), metavar="N", help="Documents of each task. [default: all]")
@_option("--quantised", metavar="8,4,2", help="Bits of rounded caches, measured for source and model.")
@_option("--positions", type=click.IntRange(min=1), metavar="N", help="Perplexity by position on N whole contexts.")
@_option("--needles", metavar="1024,2048", help="Context lengths of RULER's needle test.")
@_option(
    "--gate",
    multiple=True,
    metavar="NAME=SHARE",
    help="Smallest recovery of perplexity, tasks or needles, else exit code 5; repeatable. [default: of the suite]",
)
@_option("--dtype", type=click.Choice(DTYPES), default="bfloat16", help="To compute and to cache in; auto: as stored.")
@_device
@_option(
    "--json",
    "json_file",
    metavar="FILE",
    help="Write the results here, - for stdout instead of tables. An evaluation that is interrupted goes on from "
    "FILE.partial.",
)
@_option("--reuse", metavar="FILE", help="Earlier result of the same SRC and suite: SRC is not measured again.")
@_option("-q", "--quiet", is_flag=True, help="No progress bars.")
def eval_command(model: str, json_file: str | None, quiet: bool, **given: Any) -> None:
    """Measure MODEL and SRC in the same way: perplexity ± standard error, their paired ratio, cache bytes per token.

    A suite adds agreement, rounded caches, positions, tasks and needles; an option adds one of them.
    """
    with _errors():
        import transmla

        _quiet_libraries()
        from rich.console import Console

        from transmla.display import progress, show_evaluation

        to_file = json_file not in (None, "-")
        with progress(quiet) as update:
            kept = f"{json_file}.partial" if to_file else None
            report = transmla.evaluate(model, progress=update, kept=kept, **_lists(given))
        content = json.dumps(report.plain(), indent=1, allow_nan=False)
        if json_file == "-":
            click.echo(content)
        else:
            show_evaluation(report, Console())
        if json_file is not None and to_file:
            _write(json_file, content + "\n")
        missed = [gate for gate in report.gates if not gate.passed]
        if missed:
            raise GateError(
                f"{len(missed)} of {len(report.gates)} gates missed",
                where=", ".join(gate.name for gate in missed),
                why=", ".join(f"{gate.found:.3f} of {gate.wanted}" for gate in missed),
                remedy="use a larger latent, more refinement or healing; or set the gate with --gate",
            )


def _lists(given: dict[str, Any]) -> dict[str, Any]:
    """Words of eval's options as lists and numbers."""
    given["text"] = list(given["text"]) or None
    given["tasks"] = given["tasks"].split(",") if given["tasks"] else None
    for name in ("quantised", "needles"):
        given[name] = _integers(given[name], f"--{name}") if given[name] else None
    gates = {}
    for gate in given.pop("gate"):
        name, _, share = gate.partition("=")
        gates[name] = _number(share or None, "--gate", auto=False)
    return given | {"gates": gates or None}


def _integers(text: str, option: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise click.BadParameter(f"{text!r} are not positive whole numbers, separated by commas", param_hint=option)
    return [int(word) for word in words]


def _write(name: str, text: str) -> None:
    from pathlib import Path

    from transmla.checkpoint.destination import disk_errors

    with disk_errors(Path(name)):
        Path(name).write_text(text, encoding="utf-8")


@main.command("bench", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@_option("--against", metavar="SRC", help="The source, timed in turns with MODEL.")
@_option("--context", "contexts", default="512,2048,8192", metavar="A,B", help="Cached tokens per text.")
@_option("--batch", "batches", default="1", metavar="A,B", help="Texts at once.")
@_option("--steps", type=click.IntRange(min=1), default=16, metavar="N", help="Decoding steps per timing.")
@_option("--repeats", type=click.IntRange(min=1), default=3, metavar="N", help="Timings; the median is shown.")
@_option("--stock", is_flag=True, help="Also the stock transformers class of MODEL.")
@_option("--dtype", type=click.Choice(DTYPES[1:]), default="bfloat16", help="To compute and to cache in.")
@_device
@_option("--json", "json_file", metavar="FILE", help="Write the results here, - for stdout instead of the table.")
@_option("-q", "--quiet", is_flag=True, help="No progress bars.")
def bench_command(model: str, json_file: str | None, quiet: bool, **given: Any) -> None:
    """Time prefill and decoding of MODEL and SRC in alternating runs, and measure what they cache.

    "x floor" is the time of a decoding step over what its bytes and multiply-adds need on this machine.
    """
    with _errors():
        import transmla

        _quiet_libraries()
        from rich.console import Console

        from transmla.display import progress, show_bench

        for name in ("contexts", "batches"):
            given[name] = _integers(given[name], f"--{name}")
        with progress(quiet) as update:
            report = transmla.bench(model, progress=update, **given)
        content = json.dumps(report.plain(), indent=1)
        if json_file == "-":
            click.echo(content)
            return
        show_bench(report, Console())
        if json_file is not None:
            _write(json_file, content + "\n")


@main.command("report", epilog=EPILOG)
@click.argument("results", metavar="RESULTS...", nargs=-1, required=True)
@_option("--out", default="report.html", metavar="FILE", help="The page; an existing one is replaced.")
@_option("--pictures", metavar="DIR", help="Also write every figure as PNG and SVG there.")
@_option("--published", metavar="FILE", help="JSON rows of other methods: name, bytes_per_token, ratio.")
def report_command(results: tuple[str, ...], out: str, pictures: str | None, published: str | None) -> None:
    """Make one page with tables and pictures of files that `transmla eval --json` has written."""
    with _errors():
        import transmla

        rows = []
        if published is not None:
            with click.open_file(published, encoding="utf-8") as file:
                rows = json.load(file)
        click.echo(transmla.report(results, out, pictures=pictures, published=rows))


@main.command("doctor", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@_option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor_command(model: str, as_json: bool) -> None:
    """Say for each inference engine whether it runs the folder MODEL, refuses it, or would compute something else."""
    with _errors():
        import transmla

        _quiet_libraries()
        found = transmla.doctor(model)
        if as_json:
            click.echo(json.dumps(found.summary(), indent=2))
            return
        from rich.console import Console

        from transmla.display import show_diagnosis

        show_diagnosis(found, Console())


@main.command("export", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@_option(
    "--to",
    type=click.Choice(("gguf", "vllm")),
    default="gguf",
    help="gguf: one file for llama.cpp; vllm: a folder, padded with zeros to a size that GPU kernels are built for.",
)
@_option(
    "--type",
    type=click.Choice(GGUF_TYPES),
    default="bf16",
    help="Of the GGUF weights; from q6_k on with llama.cpp's own quantiser, if that is installed.",
)
@_option(
    "--size",
    metavar="RANK+ROPE",
    help="With --to vllm: 256+64 or 512+64. [default: the smallest that is large enough]",
)
@_option("-q", "--quiet", is_flag=True, help="No progress bars.")
def export_command(model: str, out: str, quiet: bool, **given: Any) -> None:
    """Write the converted folder MODEL in another form to OUT, which must not exist. MODEL stays as it is.

    transformers and MLX-LM run MODEL itself; `transmla doctor MODEL` says what every engine takes.
    """
    with _errors():
        import transmla

        _quiet_libraries()
        from rich.console import Console

        from transmla.display import progress, show_export

        with progress(quiet) as update:
            report = transmla.export(model, out, progress=update, **given)
        show_export(report, Console())


@main.command("unfold", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@_option("--dtype", type=click.Choice(DTYPES), default="auto", help="Of the written weights; auto: as in MODEL.")
@_option("-q", "--quiet", is_flag=True, help="No progress bars.")
def unfold_command(model: str, out: str, dtype: str, quiet: bool) -> None:
    """Write the converted folder MODEL in the form for training: weights of ordinary size, no norm on the latent.

    Any trainer takes it with trust_remote_code=True, or as transmla.load(OUT). `transmla fold` makes the stock form of
    the result. MODEL itself must not be trained: an optimizer step destroys its latent rows, which are about 1e-6.
    """
    with _errors():
        import transmla

        _quiet_libraries()
        from transmla.display import progress

        with progress(quiet) as update:
            click.echo(transmla.unfold(model, out, dtype=dtype, progress=update))


@main.command("fold", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@_option("--text", metavar="TEXT", default="wikitext", help="On which the size of the latents is measured.")
@_option("--dtype", type=click.Choice(DTYPES), default="auto", help="Of the written weights; auto: as in MODEL.")
@_device
@_option("-q", "--quiet", is_flag=True, help="No progress bars.")
def fold_command(model: str, out: str, quiet: bool, **given: Any) -> None:
    """Write the unfolded folder MODEL in the stock form again, after training; verified through the stock class."""
    with _errors():
        import transmla

        _quiet_libraries()
        from transmla.display import progress

        with progress(quiet) as update:
            click.echo(transmla.fold(model, out, progress=update, **given))


@main.command("generate", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("prompt", metavar="PROMPT")
@_option("--max-new-tokens", type=click.IntRange(min=1), default=128, metavar="N", help="Tokens to generate at most.")
@_option("--temperature", type=click.FloatRange(min=0), default=0.8, metavar="T", help="0: most likely token.")
@_option("--top-p", type=click.FloatRange(min=0, max=1), default=0.95, metavar="P", help="Nucleus to sample from.")
@_option("--seed", type=int, default=0, help="Of the sampling.")
@_option("--chat", is_flag=True, help="Put PROMPT through the chat template as a user's message.")
@_option("--dtype", type=click.Choice(DTYPES), default="auto", help="To compute in; auto: as stored.")
@_device
def generate_command(model: str, prompt: str, chat: bool, **given: Any) -> None:
    """Stream a continuation of PROMPT from MODEL, a converted folder or a source."""
    with _errors():
        import transmla

        _quiet_libraries()
        if not chat:
            click.echo(prompt, nl=False)
        for piece in transmla.generate(model, prompt, chat=chat, **given):
            click.echo(piece, nl=False)
        click.echo()


def _sizes(given: dict[str, Any]) -> dict[str, Any]:
    """--latent and --budget from words to numbers, in place."""
    latent = given["latent"]
    if latent not in (None, "auto"):
        try:
            given["latent"] = int(latent)
        except ValueError:
            raise click.BadParameter(f"{latent!r} is neither an integer nor auto", param_hint="--latent") from None
    budget = given["budget"]
    if budget is not None:
        percent = _number(budget.removesuffix("%"), "--budget", auto=False)
        given["budget"] = float(percent) / (100 if budget.endswith("%") else 1) if percent is not None else None
    return given


def _number(text: str | None, option: str, auto: bool = True) -> float | str | None:
    if text is None or (auto and text == "auto"):
        return text
    try:
        return float(text)
    except ValueError:
        wanted = "neither a number nor auto" if auto else "not a number"
        raise click.BadParameter(f"{text!r} is {wanted}", param_hint=option) from None


def _first_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


__all__ = ["main"]
