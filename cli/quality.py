"""`galerne quality`: what a bundle's recipe costs on text."""

from json import loads
from pathlib import Path
from typing import Annotated

import typer

from galerne.cli.output import BundlePath, Json, SourcePath, emit, size
from galerne.errors import CheckFailed
from galerne.progress import step


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(quality)


def quality(
    bundle: BundlePath,
    source: SourcePath,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text that the model was not trained on, UTF-8.")],
    engine: Annotated[str | None, typer.Option(help="The engine; by default the one that `generate` takes.")] = None,
    tokens: Annotated[int, typer.Option(help="The most tokens to feed.", min=2)] = 4096,
    length: Annotated[int, typer.Option(help="Tokens of one sequence.", min=2)] = 512,
    thresholds: Annotated[Path | None, typer.Option(metavar="TOML", help="Limits; exit status 1 beyond them.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as an HTML page.")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(metavar="JSON", help="Another bundle's report, for the page's plot of sizes.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure perplexity, KL and top-1 agreement against the unrounded source, and enter the verdict into the bundle."""
    from galerne.export.checkpoint.open import open_checkpoint
    from galerne.export.quality.page import html as to_html
    from galerne.export.quality.quality import measure
    from galerne.export.quality.report import read_beside
    from galerne.export.quality.thresholds import Thresholds, load
    from galerne.runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    limits = Thresholds() if thresholds is None else load(thresholds)
    others = [read_beside(path) for path in beside or ()]
    with step("quality"):
        report = measure(
            opened, open_checkpoint(source), text, limits=limits, engine=engine, tokens=tokens, length=length
        )
    opened.with_quality(report.engine, report.to_json(), report.passed)
    if html is not None:
        html.write_text(to_html(report, others), encoding="utf-8")
    ratio = report.perplexity / report.source_perplexity
    lines = (
        f"engine      {report.engine}\n"
        f"text        {report.tokens} tokens of {report.text}\n"
        f"perplexity  {report.perplexity:.4g}, {ratio:.4f} times the source's {report.source_perplexity:.4g}\n"
        f"KL          {report.mean_kl:.3g} nats on average, {report.p99_kl:.3g} at the 99th percentile\n"
        f"top-1       {report.top1_agreement:.2%} the same\n"
        f"size        {size(report.size_bytes)}"
    )
    emit(json, loads(report.to_json()), lines)
    if not report.passed:
        raise CheckFailed(f"{bundle}: its quality is not enough: {'; '.join(report.failures)}")
