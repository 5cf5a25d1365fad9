"""`galerne verify`: parity against the PyTorch source, here or as it was recorded."""

from collections.abc import Sequence
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from galerne.cli.output import Adapter, BundlePath, Json, emit, table
from galerne.errors import CheckFailed, InputError
from galerne.progress import Task, step

if TYPE_CHECKING:
    from galerne.runtime.measures import CaseResult


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(verify)


def verify(
    bundle: BundlePath,
    source: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="The checkpoint that the bundle was made from.", show_default=False),
    ] = None,
    engine: Annotated[str, typer.Option(help='"portable", or the name of an engine in the bundle.')] = "portable",
    html: Annotated[Path | None, typer.Option(help="Also write the report as an HTML page.")] = None,
    adapter: Adapter = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only record what PyTorch gives, for --recorded on a machine without it."),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with what --record wrote, in place of --source: needs no PyTorch."),
    ] = None,
    json: Json = False,
) -> None:
    """Run the bundle beside the PyTorch source, compare, and enter the verdict into the bundle."""
    if (source is None) == (recorded is None):
        raise InputError("verify: expected --source, or --recorded without it")
    if adapter is not None and (record or recorded):
        raise InputError("--adapter: a recorded parity set has none; leave it out")
    if recorded is not None:
        if html is not None:
            raise InputError("--html: a replay has no page; leave it out")
        _replay(bundle, engine, recorded, json)
    else:
        assert source is not None
        if record is not None:
            _record(bundle, source, record, json)
        else:
            _verify(bundle, source, engine, html, adapter, json)


def _verify(bundle: Path, source: Path, engine: str, html: Path | None, adapter: Path | None, json: bool) -> None:
    from galerne.export.checkpoint.open import open_checkpoint
    from galerne.export.parity.report import html as to_html
    from galerne.export.parity.verify import verify as run
    from galerne.runtime.bundle import Bundle
    from galerne.runtime.lora import CONFIG

    opened = Bundle.open(bundle)
    # With slots for adapters, and none merged into it, the bundle shall run with this one.
    chosen = adapter if opened.manifest.graph.adapter_slots and CONFIG not in opened.manifest.source.files else None
    with step(f"verify {engine}"):
        checkpoint = open_checkpoint(source, None if chosen else adapter)
        report = run(opened, checkpoint, engine=engine, adapter=chosen)
    if chosen is None:  # the manifest's verdict is on the bundle, whatever adapter comes
        opened.with_verdict(engine, report.to_json(), report.passed)
    if html is not None:
        html.write_text(to_html(report), encoding="utf-8")
    _show(bundle, engine, loads(report.to_json()), report.all_cases, json)


def _record(bundle: Path, source: Path, file: Path, json: bool) -> None:
    from galerne.export.checkpoint.open import open_checkpoint
    from galerne.export.parity.recorded import record as run
    from galerne.runtime.bundle import Bundle

    recording = run(Bundle.open(bundle), open_checkpoint(source))
    recording.write(file)
    cases, positions = [case.name for case in recording.facts.cases], len(recording.positions)
    data = {"file": str(file), "size_bytes": file.stat().st_size, "cases": cases, "positions": positions}
    emit(json, data, f"{file}: {len(cases)} cases, logits at {positions} of {len(recording.tokens)} positions")


def _replay(bundle: Path, engine: str, file: Path, json: bool) -> None:
    from galerne.runtime.bundle import Bundle
    from galerne.runtime.measures import plain
    from galerne.runtime.recorded import Recording, replay

    recording, opened = Recording.read(file), Bundle.open(bundle)
    with step(f"verify {engine} against {file.name}"), Task("parity", len(recording.facts.cases)) as task:
        found = replay(recording, opened, engine, task.advance)
    _show(bundle, engine, plain(found), found.cases, json)


def _show(bundle: Path, engine: str, data: dict[str, Any], cases: "Sequence[CaseResult]", json: bool) -> None:
    rows = [["case", "tokens", "max abs", "mean KL", "top-1", "passed"]]
    for case in cases:
        figures = ["-" if figure is None else f"{figure:.2e}" for figure in (case.max_abs, case.mean_kl)]
        rows.append(
            [case.name, str(case.tokens), *figures, f"{case.top1_agreement:.4f}", "yes" if case.passed else "NO"]
        )
    emit(json, data, table(rows))
    if failed := [case for case in cases if not case.passed]:
        reasons = "; ".join(f"{case.name} ({', '.join(case.failures)})" for case in failed)
        raise CheckFailed(f"{bundle}: {engine} does not match its source: {reasons}")
