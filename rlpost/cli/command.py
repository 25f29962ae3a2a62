"""Classes for typer: a command that keeps stdout for results, and a group whose help has sections."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup

from rlpost.results import kept_for_results

SECTIONS = {
    "Train": ("train", "sweep", "copy"),
    "Look": ("show", "list", "report", "rollouts", "schema", "verify", "doctor"),
    "Use": ("eval", "compare", "sample", "chat", "serve", "pairs"),
    "Export": ("merge", "push", "import-gguf"),
    "Goals": ("goals",),
}
"""Commands in the order of `rlpost --help`."""
MOVED = ("infill", "calibrate", "plot")
"""Commands that are now in the group `goals`."""


class Command(TyperCommand):
    """A command that keeps stdout for results."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`RECIPE [KEY=VALUE]...`: optional arguments in brackets, required ones without."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one line per argument, without its type, then the options."""
        params = self.get_params(ctx)
        arguments = [(p.metavar, p.help) for p in params if isinstance(p, TyperArgument)]
        options = [p.get_help_record(ctx) for p in params if not isinstance(p, TyperArgument)]
        formatter.write_paragraph()
        for title, lines in (("Arguments", arguments), ("Options", [line for line in options if line])):
            if lines:
                formatter.write_heading(title)
                with formatter.indentation():
                    formatter.write_dl(lines)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, then end the processes of users' code."""
        from rlpost.usercode.process import end_all

        try:
            with kept_for_results():
                return super().invoke(ctx)
        finally:
            end_all()


class Sections(TyperGroup):
    """The commands of `rlpost`; its help has sections."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - the base class's signature
        """Write one line per command, section by section."""
        formatter.write_paragraph()
        width = max(map(len, self.commands))
        limit = formatter.width - 6 - width
        for title, names in SECTIONS.items():
            formatter.write_heading(title)
            with formatter.indentation():
                formatter.write_dl([(f"{n:<{width}}", self.commands[n].get_short_help_str(limit)) for n in names])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; fail with its new name where it has moved."""
        if args[0] in MOVED and not ctx.resilient_parsing:
            ctx.fail(f"`rlpost {args[0]}` is now `rlpost goals {args[0]}`")
        return super().resolve_command(ctx, args)
