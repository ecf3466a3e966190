"""``python -m ssdir``: the command line, for launchers that start a module."""

from __future__ import annotations

import sys

from ssdir.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
