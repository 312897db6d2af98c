"""The `fs3` command: one file per group of commands, loaded when used."""

from __future__ import annotations

import importlib
import os
import sys

import click

from fs3 import __version__
from fs3.core.errors import Fs3Error

# Command name -> module below fs3.cli that defines it under the same name (dashes become underscores).
COMMANDS = {
    "up": "local",
    "down": "local",
    "status": "local",
    "scrub": "health",
    "mgmtd": "services",
    "meta": "services",
    "storage": "services",
    "mount": "mount",
    "umount": "mount",
    "stats": "mount",
    "ls": "files",
    "stat": "files",
    "cat": "files",
    "mv": "files",
    "rm": "files",
    "mkdir": "files",
    "ln": "files",
    "du": "files",
    "layout": "layout",
    "trash": "trash",
    "quota": "quota",
    "cp": "copy",
    "data": "data",
    "checkpoint": "checkpoint",
    "kv": "kv",
    "doctor": "doctor",
    "admin": "admin",
    "rdma": "rdma",
    "trace": "trace",
    "bench": "bench",
    "completion": "completion",
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        found = getattr(importlib.import_module(f"fs3.cli.{module}"), f"{cmd_name}_command")
        assert isinstance(found, click.Command)
        return found


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fs3")
def cli() -> None:
    """fs3, a distributed file system for AI training and inference.

    Start a cluster on this machine with `fs3 up`, mount it with `fs3 mount MOUNTPOINT`, or work on it without a mount:
    `fs3 cp -r ./data :/data`, `fs3 ls :/data`. Exit status: 0 done, 1 failed, 2 wrong usage.
    """


def main() -> int:
    """Run the command line. Operating errors become one line on standard error and exit status 1."""
    try:
        code = cli.main(prog_name="fs3", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Abort:
        print("fs3: interrupted", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("fs3: interrupted", file=sys.stderr)
        return 130
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except click.exceptions.Exit as e:
        return e.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (`fs3 ls | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Fs3Error as e:
        # Most messages name what they are about.
        name = os.fsdecode(e.filename) if isinstance(e.filename, str | bytes) else ""
        prefix = "" if os.path.basename(name) in e.message else f"{name}: "
        print(f"fs3: {prefix}{e.message}", file=sys.stderr)
        return 1
    except OSError as e:
        name = f"{e.filename}: " if e.filename else ""
        print(f"fs3: {name}{e.strerror or e}", file=sys.stderr)
        return 1
