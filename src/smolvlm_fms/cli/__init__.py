"""The ``smolvlm`` command. One thin file a command; nothing here computes anything.

Each module in ``COMMANDS`` has ``register(app)``. A command imports what is slow to import inside its own body, so that
``smolvlm --help`` answers at once.

Exit codes: 0 done, 1 one of our own errors (one line on standard error), 2 wrong usage, 3 partly done
(some of ``batch``'s questions or ``convert-document``'s pages failed), 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys

import typer

from smolvlm_fms.errors import SmolVLMError

__all__ = ["app", "main"]

COMMANDS = ("ask", "chat", "batch", "inspect", "verify", "eval", "demo", "train", "convert", "convert_document")

app = typer.Typer(
    name="smolvlm",
    help="Small vision-language models on IBM's Foundation Model Stack: run, check, train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for _name in COMMANDS:
    importlib.import_module(f"smolvlm_fms.cli.{_name}").register(app)


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", is_eager=True, help="Print the version and exit."),
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"smolvlm-fms {installed('smolvlm-fms')}")
        raise typer.Exit()


def main() -> None:
    """Entry point: run a command; turn our own errors into one line and exit code 1."""
    try:
        app()
    except SmolVLMError as error:
        if os.environ.get("SMOLVLM_TRACEBACK"):
            raise
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader went away (`smolvlm … | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
