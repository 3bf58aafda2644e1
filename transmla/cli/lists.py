"""transmla recipes and transmla families."""

from __future__ import annotations

from dataclasses import asdict

from transmla.cli.frame import as_json, command, emit, errors, quiet_libraries


@command("recipes", "transmla recipes")
@as_json
def recipes_command(json_file: str | None) -> None:
    """List the installed recipes: what they convert, how much cache is left, and which engines run the result.

    A recipe's name can stand for SRC in every command. Its state is measured where results are published with the
    program, and planned where they are not yet.
    """
    _listed("recipes", json_file)


@command("families", "transmla families")
@as_json
def families_command(json_file: str | None) -> None:
    """List the model families that can be converted, and the form that each of them gets.

    deepseek_v3 runs in all engines, but with biases in the attention, as Qwen2 has them, in transformers, MLX-LM and
    vLLM --model-impl transformers alone (`convert --lossy` leaves them out); transmla is the family's own class with
    latent attention, for transformers and, where this program is installed, vLLM. Listed is what a family gets by the
    defaults of its class. Other settings, as Granite's multipliers, can change the form: `transmla plan` says it of a
    model.
    """
    _listed("families", json_file)


def _listed(what: str, json_file: str | None) -> None:
    """Print what `transmla.list_recipes` or `transmla.list_families` returns."""
    with errors():
        import transmla

        quiet_libraries(loading=False)
        rows = getattr(transmla, f"list_{what}")()
        from transmla.conversion import show_lists

        emit(lambda: [asdict(row) for row in rows], json_file, lambda: getattr(show_lists, f"show_{what}")(rows))
