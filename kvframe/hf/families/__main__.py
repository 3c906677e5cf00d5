"""`python -m kvframe.hf.families`: the sweep without the rest of the command line."""

import argparse
import sys
from pathlib import Path

from kvframe.hf.families.command import run_sweep


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m kvframe.hf.families", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all if none is given")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--jobs", type=int, default=1, help="families compared at the same time")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds one family may take")
    parser.add_argument("--markdown", type=Path, help="write the result to this file as a page of the documentation")
    given = parser.parse_args()
    return run_sweep(given.types, given.json, given.jobs, given.timeout, given.markdown)


if __name__ == "__main__":
    sys.exit(main())
