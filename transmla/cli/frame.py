"""What all commands share: options, errors as messages with exit codes, words to numbers. Only click is imported."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from transmla.cli.help import OTHERS, Command, Option
from transmla.errors import TransmlaError
from transmla.recipe import LATENT_BITS

EPILOG = (
    "Exit codes: 0 done, 2 usage, 3 source unreadable, 4 model not supported, 5 over budget or gate missed, "
    "6 impossible geometry, 7 text missing or too short, 8 destination, 9 verification failed, 10 recipe or suite, "
    "130 interrupted, 143 terminated, 1 anything else."
)


def command(name: str, *examples: str) -> Callable[[Any], click.Command]:
    """Decorator of a command with examples."""
    return click.command(name, cls=Command, epilog=EPILOG, examples=examples)


def option(*names: str, group: str = OTHERS, **kwargs: Any) -> Callable[[Any], Any]:
    """An option that shows its default, under a heading of the help."""
    return click.option(*names, cls=Option, group=group, show_default=True, **kwargs)


device = option(
    "--device",
    default="auto",
    metavar="DEVICE",
    help="Where to compute: cpu, cuda, cuda:1; auto: a GPU if there is one.",
    group="Machine",
)
quiet = option("-q", "--quiet", is_flag=True, help="Show no progress.", group="Output")


def _json_file(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    """The value of --json; a file that cannot be written is refused before hours of work, not behind them."""
    if name not in (None, "-"):
        with errors():
            from transmla.checkpoint.destination import check_file

            check_file(name)
    return name


as_json = option(
    "--json",
    "json_file",
    callback=_json_file,
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Print the result as JSON instead of tables (put it last then); with FILE, write it there beside them.",
    group="Output",
)


def rounding_options(group: str) -> Callable[[Any], Any]:
    """Decorator with the options of training for a packed cache, under a heading of the help."""
    bits = option(
        "--latent-bits",
        type=click.Choice(LATENT_BITS),
        help="Train and measure with latents rounded as in the cache latent-intN, so that the weights make up for it. "
        "[default: exact latents]",
        group=group,
    )
    recent = option(
        "--latent-recent",
        type=click.IntRange(min=0),
        metavar="N",
        help="With --latent-bits: newest tokens that stay exact. [default: 64, as in the caches]",
        group=group,
    )
    return lambda decorated: bits(recent(decorated))


@contextmanager
def errors() -> Iterator[None]:
    """Expected errors as one message and their exit code; everything else keeps its traceback. SIGTERM, with which
    schedulers stop a job, ends a command like Ctrl-C."""
    try:
        with _signals():
            yield
    except TransmlaError as error:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        from transmla.evaluation.steps import ran_out_of_memory

        if not ran_out_of_memory(error):
            raise
        click.echo(f"{click.style('error:', fg='red', bold=True)} {_out_of_memory(error)}", err=True)
        sys.exit(1)
    except KeyboardInterrupt as error:
        click.echo(
            f"interrupted; nothing is half-written{', and the same command resumes' if _resumes() else ''}", err=True
        )
        sys.exit(143 if isinstance(error, Terminated) else 130)


def _resumes() -> bool:
    """Whether the command that is running keeps what it has done."""
    context = click.get_current_context(silent=True)
    if context is None:
        return False
    return context.info_name in ("convert", "heal") or (
        context.info_name == "eval" and keeps_beside(context.params.get("json_file"))
    )


def keeps_beside(json_file: str | None) -> bool:
    """Whether the results go into a file, beside which unfinished ones can lie; not into a pipe or a terminal."""
    return json_file not in (None, "-") and (os.path.isfile(json_file) or not os.path.exists(json_file))


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


# signals that came while a command runs
_ARRIVED: list[type[KeyboardInterrupt]] = []


def heed() -> None:
    """Raise what came and was lost, as exceptions are in finalisers and callbacks of libraries."""
    if _ARRIVED:
        raise _ARRIVED[-1]


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM as an exception, like Ctrl-C; and both where a library has made another error of them: torch, if it is
    asking a storage for its length, says that this has no shape."""
    arrived = _ARRIVED
    arrived.clear()

    def raised(number: int, frame: object) -> None:
        arrived.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise arrived[-1]

    before: dict[int, Any] = {}
    try:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, raised)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored, as behind nohup
            before[signal.SIGINT] = signal.signal(signal.SIGINT, raised)
    except ValueError:  # not in the main thread, which alone may do this
        yield
        return
    try:
        yield
    except Exception as error:
        if arrived:
            raise arrived[-1] from error
        raise
    finally:
        arrived.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _out_of_memory(error: Exception) -> TransmlaError:
    return TransmlaError(
        "out of memory",
        where="the device",
        why=(str(error).splitlines() or [type(error).__name__])[0],
        remedy="use --device cpu, a smaller --dtype or shorter windows (--length, --window); of a conversion, fewer "
        "--tokens, --offload or --block-layers",
    )


def is_first_process() -> bool:
    """Of those that a launcher has started: the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def quiet_libraries(bars: bool = True, *, loading: bool = True) -> None:
    """Only what this program says itself.

    bars:    progress bars of libraries may show (downloads)
    loading: transformers will load a model; otherwise it is not imported for this alone
    """
    import logging
    import warnings

    if not bars:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # read when it is imported
    if loading or "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    for name in ("torch", "gguf", "lm_eval", "datasets", "evaluate", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


class NumberRange(click.FloatRange):
    """A number within a range; nan is on no side of its limits, and would pass."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        found = float(super().convert(value, param, context))
        if math.isnan(found):
            self.fail(f"{value!r} is not a number", param, context)
        return found


class Scaled(click.ParamType[int]):
    """A number of something, with a unit or without -> int.

    name: of the type;  units: unit -> factor, in any case;  said: what is counted, and examples, for the error
    """

    def __init__(self, name: str, units: Mapping[str, int], said: str) -> None:
        self.name, self._said = name, said
        self._units = {unit.lower(): factor for unit, factor in units.items()}

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        unit = next((unit for unit in self._units if value.lower().endswith(unit)), "")
        try:
            found = round(float(value[: len(value) - len(unit)]) * self._units.get(unit, 1))
        except (ValueError, OverflowError):
            found = 0
        if found < 1:
            self.fail(f"{value!r} is not a number of {self._said}", param, context)
        return found


def integers(text: str, option: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise click.BadParameter(f"{text!r} are not positive whole numbers, separated by commas", param_hint=option)
    return [int(word) for word in words]


def number(text: str | None, option: str, auto: bool = True) -> float | str | None:
    if text is None or (auto and text == "auto"):
        return text
    try:
        return float(text)
    except ValueError:
        wanted = "neither a number nor auto" if auto else "not a number"
        raise click.BadParameter(f"{text!r} is {wanted}", param_hint=option) from None


def write_file(name: str, text: str) -> None:
    from pathlib import Path

    from transmla.checkpoint.destination import write_whole

    write_whole(Path(name), text)


def emit(content: Callable[[], Any], json_file: str | None, tables: Callable[[], None]) -> None:
    """What a command has found: tables, or JSON as `as_json` says.

    content: gives plain values;  tables: prints
    """
    if json_file == "-":
        click.echo(_json(content()))
        return
    try:  # whichever of the two fails, the other is there
        if json_file is not None:
            write_file(json_file, _json(content()) + "\n")
    finally:
        tables()


def _json(content: Any) -> str:
    import json

    return json.dumps(content, indent=2, allow_nan=False, default=str)


def note_emulation(dtype: str, device: str) -> None:
    """Say on stderr if the device has no instructions for the dtype that is computed in: timings are those of another
    program then, and measurements take several times as long."""
    from transmla.devices import named, narrow_dtype, usable

    if dtype == "bfloat16" and narrow_dtype(usable(named(device))) is None:
        click.echo("note: bfloat16 is emulated on this device; --dtype float32 is several times as fast", err=True)


def source_of(model: str, against: str | None) -> str | None:
    """What `--against` means: the source that the provenance of MODEL names where nothing is given, none for "none"."""
    if against == "none":
        return None
    if against is not None:
        return against
    from pathlib import Path

    from transmla.checkpoint.provenance import FILE_NAME, named_source, read_provenance
    from transmla.checkpoint.resolve import local, resolve

    if local(model) is None or not (Path(model) / FILE_NAME).is_file():
        return None
    if "source" not in read_provenance(Path(model)):  # folded from what another trainer has saved
        return None
    name = named_source(Path(model))
    try:
        resolve(name, read_provenance(Path(model))["source"].get("revision"), headers_only=True)
    except TransmlaError:
        click.echo(
            f"note: its source, {name}, is not here; without --against there is nothing to compare with", err=True
        )
        return None
    click.echo(f"against {name}, which MODEL was made from", err=True)
    return name
