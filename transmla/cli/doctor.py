"""transmla doctor."""

from __future__ import annotations

import click

from transmla.cli.frame import as_json, command, emit, errors, quiet_libraries


@command("doctor", "transmla doctor OUT", "transmla doctor OUT.gguf", "transmla doctor SRC")
@click.argument("model", metavar="MODEL")
@as_json
def doctor_command(model: str, json_file: str | None) -> None:
    """Say for each inference engine whether it runs the folder MODEL, refuses it, or would compute something else.

    MODEL may also be a GGUF file that `export` has written, or a source that is not converted yet: then it is said of
    what `convert` would write with the defaults.
    """
    with errors():
        import transmla

        quiet_libraries(loading=False)
        found = transmla.doctor(model)
        from rich.console import Console

        from transmla.targets.show_doctor import show_diagnosis

        emit(found.summary, json_file, lambda: show_diagnosis(found, Console()))
