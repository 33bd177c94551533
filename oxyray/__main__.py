"""`python -m oxyray` is `oxyray`."""

from __future__ import annotations

import sys

from oxyray.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
