"""``smolvlm train``: fine-tune a checkpoint as a YAML file says, or go on where it stopped."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def train(
        config: Path = typer.Argument(..., metavar="CONFIG.yaml", help="What to train on what, and how."),
        overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Such as optim.lr=1e-4 steps=200."),
        preflight: bool = typer.Option(False, "--preflight", help="Report on the data and stop before the first step."),
    ) -> None:
        """Fine-tune a checkpoint. The same command again goes on where the run stopped.

        The run folder then holds config.yaml, metrics.jsonl, samples.jsonl, preflight.json, checkpoints/ and, at the
        end, final/: a folder that `smolvlm ask --model` and transformers load. Under torchrun, the run is sharded.
        """
        from smolvlm_fms.training.config import TrainConfig
        from smolvlm_fms.training.run import prepare
        from smolvlm_fms.training.run import train as run

        settings = TrainConfig.load(config, overrides or [])
        if preflight:
            for line in prepare(settings)[1].lines():
                typer.echo(line)
            return
        result = run(settings, typer.echo)
        if result.finished:
            typer.echo(f"Done after {result.step} steps: {result.final}")
        else:
            typer.echo(f"Stopped after step {result.step}; the same command goes on from there.")
