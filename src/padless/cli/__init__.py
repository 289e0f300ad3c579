"""The `padless` command: one file a subcommand, rich for people, `--json` for machines."""

from __future__ import annotations

import typer

from padless.cli.bench import bench_command
from padless.cli.doctor import doctor_command
from padless.cli.verify import verify_command

app = typer.Typer(
    name="padless",
    help="Run a Hugging Face LLaMA on its real tokens only, and prove that it is the same model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.command("bench")(bench_command)
app.command("verify")(verify_command)
app.command("doctor")(doctor_command)


def main() -> None:
    """Runs the command line."""
    app()
