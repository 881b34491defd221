"""Runs the command line from a checkout: `python bitgen_cli.py train ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from bitgen.cli.app import main  # noqa: E402  (the path above must come first)

if __name__ == "__main__":
    main()
