"""How help looks: commands in order of use, options in groups, examples at the end. Only click is imported."""

from __future__ import annotations

from typing import Any

import click

# of options that say nothing else
OTHERS = "Options"


class Option(click.Option):
    """group: heading under which help shows it"""

    def __init__(self, *names: Any, group: str = OTHERS, **kwargs: Any) -> None:
        super().__init__(*names, **kwargs)
        self.group = group


class Command(click.Command):
    """examples: whole command lines"""

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def groups(self, context: click.Context) -> dict[str, list[click.Parameter]]:
        """Options by heading, in order of their first; those without a heading are last."""
        found: dict[str, list[click.Parameter]] = {}
        for parameter in self.get_params(context):
            if not isinstance(parameter, click.Argument):
                found.setdefault(getattr(parameter, "group", OTHERS), []).append(parameter)
        others = found.pop(OTHERS, [])
        return found | ({OTHERS: others} if others else {})

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, parameters in self.groups(context).items():
            records = (parameter.get_help_record(context) for parameter in parameters)
            with formatter.section(heading):
                formatter.write_dl([record for record in records if record is not None])

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")
        super().format_epilog(context, formatter)


class Commands(click.Group):
    """sections: heading -> names of commands; what is in none comes last"""

    def __init__(self, *args: Any, sections: dict[str, tuple[str, ...]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections

    def by_section(self) -> dict[str, list[str]]:
        named = [name for names in self.sections.values() for name in names]
        found = {heading: [name for name in names if name in self.commands] for heading, names in self.sections.items()}
        others = [name for name in self.commands if name not in named]
        return found | ({"Others": others} if others else {})

    def list_commands(self, context: click.Context) -> list[str]:
        return [name for names in self.by_section().values() for name in names]

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(name) for name in self.commands)
        for heading, names in self.by_section().items():
            with formatter.section(heading):
                # a first sentence is never cut off
                formatter.write_dl(
                    [(f"{name:<{width}}", self.commands[name].get_short_help_str(500)) for name in names]
                )
