"""The command line. Here and in the commands' modules only click is imported; everything else is imported when a
command runs, so that `transmla --help` answers at once. Every command is one documented Python call."""

from __future__ import annotations

import click

from transmla.cli.bench import bench_command
from transmla.cli.convert import convert_command
from transmla.cli.doctor import doctor_command
from transmla.cli.evaluate import eval_command
from transmla.cli.export import export_command
from transmla.cli.fold import fold_command, unfold_command
from transmla.cli.frame import EPILOG
from transmla.cli.generate import generate_command
from transmla.cli.heal import heal_command
from transmla.cli.help import Commands
from transmla.cli.lists import families_command, recipes_command
from transmla.cli.plan import plan_command
from transmla.cli.push import push_command
from transmla.cli.quantise import quantise_command
from transmla.cli.report import report_command
from transmla.cli.verify import verify_command

SECTIONS = {
    "Convert": ("plan", "convert", "heal"),
    "Measure": ("eval", "bench", "report"),
    "Use": ("doctor", "verify", "generate", "quantise", "export", "push"),
    "Train it yourself": ("unfold", "fold"),
    "What there is": ("recipes", "families"),
}


@click.group(
    cls=Commands,
    sections=SECTIONS,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="transmla", prog_name="transmla")
def main() -> None:
    """Retrofit multi-head latent attention (MLA) onto pretrained GQA, MHA and MQA language models.

    SRC is a Hugging Face folder, a .gguf file, a hub id, the name of a recipe, or stories260k (a 1 MB model
    that ships with the program). MODEL and OUT are folders that `convert` has written.
    """


for command in (
    plan_command, convert_command, heal_command, eval_command, bench_command, report_command, doctor_command,
    verify_command, generate_command, quantise_command, export_command, push_command, unfold_command, fold_command,
    recipes_command,
    families_command,
):  # fmt: skip
    main.add_command(command)

__all__ = ["main"]
