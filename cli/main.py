"""The `galerne` command: one handler for errors, one module for each subcommand."""

import logging
import sys
import traceback

import click
import typer

from galerne.cli import bench, build, demo, export, generate, inspect, targets, verify
from galerne.errors import GalerneError

_BUG, _INTERRUPTED = 70, 130

app = typer.Typer(
    name="galerne",
    help="Mistral-style decoders from PyTorch to ONNX and TensorRT engines, with the window kept and parity proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, export, verify, build, generate, bench, inspect, targets):
    command.register(app)


def run(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check said no, 2 bad input, 3 this machine lacks it, 70 our bug."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    sys.exit(status(args))


def status(args: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        result = app(args, standalone_mode=False, prog_name="galerne")
    except GalerneError as exc:
        print(f"galerne: {exc}", file=sys.stderr)
        return exc.exit_code
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("galerne: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as `head` does. stdout is replaced, or Python complains once more at its end.
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except Exception:  # noqa: BLE001  # the last line of defence, and it hides nothing
        traceback.print_exc()
        print("galerne: this is a bug in Galerne; please report it with the lines above", file=sys.stderr)
        return _BUG
    return result if isinstance(result, int) else 0
