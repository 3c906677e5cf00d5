"""The command line: `kvframe`."""

from kvframe.cli.app import main

__all__ = ["main"]
