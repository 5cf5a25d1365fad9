"""The `galerne` command: one handler for errors, one module for each subcommand."""

import logging
import sys
import traceback
from typing import NoReturn

import typer

from galerne.cli import (
    bench,
    build,
    check,
    compile,
    demo,
    deploy,
    export,
    fit,
    generate,
    inspect,
    package,
    quality,
    quantize,
    recipe,
    synth,
    targets,
    verify,
)
from galerne.cli.extras import extra_of
from galerne.errors import BackendError, GalerneError

_BUG = 70

app = typer.Typer(
    name="galerne",
    help="Mistral-style decoders from PyTorch to ONNX and TensorRT engines, with the window kept and parity proven.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS = (
    demo,
    export,
    recipe,
    quantize,
    verify,
    quality,
    check,
    fit,
    build,
    package,
    deploy,
    compile,
    generate,
    bench,
    inspect,
    synth,
    targets,
)
for command in _COMMANDS:
    command.register(app)


def run(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check said no, 2 bad input, 3 this machine lacks it, 70 our bug."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        app(args, prog_name="galerne")  # exits by itself: 2 on bad usage, 130 when interrupted
    except GalerneError as exc:
        print(f"galerne: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    except ModuleNotFoundError as exc:
        extra = extra_of(exc.name)
        if extra is None:
            _our_bug()
        print(
            f"galerne: {exc.name} is not installed, which this needs: pip install 'galerne[{extra}]'", file=sys.stderr
        )
        sys.exit(BackendError.exit_code)
    except Exception:  # noqa: BLE001  # the last line of defence, and it hides nothing
        _our_bug()


def _our_bug() -> NoReturn:
    traceback.print_exc()
    print("galerne: this is a bug in Galerne; please report it with the lines above", file=sys.stderr)
    sys.exit(_BUG)
