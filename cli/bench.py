"""`galerne bench`: how fast a bundle runs here."""

import dataclasses
from typing import Annotated

import typer

from galerne.cli.output import BundlePath, Json, RunAdapter, Threads, emit, size


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(bench)


def bench(
    bundle: BundlePath,
    engine: Annotated[str | None, typer.Option(help="The engine; by default the one that `generate` takes.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 512,
    decode_tokens: Annotated[int, typer.Option(help="Tokens to decode after it.", min=1)] = 40,
    adapter: RunAdapter = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure prefill, decode, load and memory, beside the bound that this machine's bandwidth sets."""
    from galerne.runtime.bench import bench as run
    from galerne.runtime.model import Model

    model = Model.open(bundle, engine, threads=threads)
    result = run(
        model,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        adapter=None if adapter is None else model.load_adapter(adapter),
    )
    share = result.decode_tokens_per_s / result.bound_tokens_per_s
    text = (
        f"engine   {result.engine}\n"
        f"prefill  {result.prefill_tokens_per_s:.1f} tokens/s over {result.prompt_tokens}\n"
        f"decode   {result.decode_tokens_per_s:.1f} tokens/s, {share:.0%} of the bound of {result.bound_tokens_per_s:.1f} "
        f"that {result.bandwidth_bytes_per_s / 1e9:.1f} GB/s set\n"
        f"load     {result.load_s:.2f} s\n"
        f"memory   {size(result.peak_rss_bytes)} at its peak"
    )
    emit(json, dataclasses.asdict(result), text)
