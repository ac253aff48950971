"""The command line on a machine whose cards a test invents; their number is the first argument."""

from __future__ import annotations

import sys

from cards import HERE, Cards
from gpupool_sync import devices
from gpupool_sync.cli import main

if __name__ == "__main__":
    cards = Cards(int(sys.argv.pop(1)))
    devices.open_reader = lambda: cards  # type: ignore[assignment]
    devices.host_identity = lambda: HERE  # type: ignore[assignment]
    sys.exit(main())
