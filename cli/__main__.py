"""`python -m galerne.cli` is `galerne`."""

from galerne.cli.main import run

if __name__ == "__main__":
    run()
