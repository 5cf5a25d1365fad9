"""`galerne verify`: parity against the PyTorch source."""

from json import loads
from pathlib import Path
from typing import Annotated

import typer

from galerne.cli.output import Adapter, BundlePath, Json, SourcePath, emit, table
from galerne.errors import CheckFailed
from galerne.progress import step


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(verify)


def verify(
    bundle: BundlePath,
    source: SourcePath,
    engine: Annotated[str, typer.Option(help='"portable", or the name of an engine in the bundle.')] = "portable",
    html: Annotated[Path | None, typer.Option(help="Also write the report as an HTML page.")] = None,
    adapter: Adapter = None,
    json: Json = False,
) -> None:
    """Run the bundle beside the PyTorch source, compare, and enter the verdict into the bundle."""
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
    rows = [["case", "tokens", "max abs", "mean KL", "top-1", "passed"]]
    for case in report.cases:
        figures = ["-" if figure is None else f"{figure:.2e}" for figure in (case.max_abs, case.mean_kl)]
        agreement = "-" if case.top1_agreement is None else f"{case.top1_agreement:.4f}"
        rows.append([case.name, str(case.tokens), *figures, agreement, "yes" if case.passed else "NO"])
    emit(json, loads(report.to_json()), table(rows))
    if not report.passed:
        failed = ", ".join(case.name for case in report.cases if not case.passed)
        raise CheckFailed(f"{bundle}: {engine} does not match its source: {failed}")
