"""Help that opens with an example, groups that know the nearest command, and `runs` that lists by default."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from tunelab.errors import ConfigError, did_you_mean


class Command(TyperCommand):
    """A command whose help begins with its own words (an example first); usage and options follow."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.format_help_text(ctx, formatter)
        formatter.write("\n")
        self.format_usage(ctx, formatter)
        self.format_options(ctx, formatter)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options. Arguments without typer's type names: `RECIPE <str>` says no more than `RECIPE`."""
        sections: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                name = record[0].split(" <")[0] if parameter.param_type_name == "argument" else record[0]
                sections[parameter.param_type_name].append((name, record[1].removesuffix("  [required]")))
        for title, rows in sections.items():
            if rows:
                with formatter.section(f"{title.capitalize()}s"):
                    formatter.write_dl(rows)


class Group(TyperGroup):
    """A group with such help, whose unknown commands are refused with the nearest known one."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        Command.format_help(self, ctx, formatter)  # type: ignore[arg-type]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands and not cmd_name.startswith("-"):
            known = [name for name, command in self.commands.items() if not command.hidden]
            hint = did_you_mean(cmd_name, known) or f"; known: {', '.join(known)}"
            raise ConfigError(f"no such command '{ctx.command_path} {cmd_name}'{hint}")
        return super().get_command(ctx, cmd_name)


class RunsGroup(Group):
    """`tunelab runs --json` is `tunelab runs list --json`; a first word that is a condition is a filter."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = args[0] if args else "-"
        if (first.startswith("-") and first not in ctx.help_option_names) or any(sign in first for sign in "=<>"):
            args = ["list", *args]
        return super().parse_args(ctx, args)
