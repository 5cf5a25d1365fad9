#!/usr/bin/python3 -s
"""`galerne` on a box: the command line with the wheels that came in the package, and the system's TensorRT behind them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "site"))

from galerne.cli.main import run

if __name__ == "__main__":
    run()
