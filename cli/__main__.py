"""`python -m galerne.cli` is `galerne`."""

from galerne.cli.main import run

run()
