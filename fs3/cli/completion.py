"""`fs3 completion`: shell completion scripts."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the completion script of SHELL.

    For bash: fs3 completion bash > ~/.local/share/bash-completion/completions/fs3
    """
    from fs3.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "fs3", "_FS3_COMPLETE").source())
