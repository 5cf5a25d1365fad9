#!/usr/bin/python3 -s
"""`galerne` on a box: the command line with the wheels that came in the package, and the system's TensorRT behind them."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "site"))
    runpy.run_module("galerne.cli", run_name="__main__", alter_sys=True)
