"""The command line: a module a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, or 1 where something is wrong."""
    from . import bench, doctor, plot, predict, trace  # what a command needs takes seconds to import

    parser = argparse.ArgumentParser(prog="hvd-compress", description="Gradient compression for PyTorch training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (doctor, predict, bench, plot, trace):
        command.add_to(commands)
    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code
