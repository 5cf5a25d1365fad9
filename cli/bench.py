"""`galerne bench`: how fast a bundle runs here."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from galerne.cli.output import BundlePath, Json, RunAdapter, Threads, emit, size
from galerne.errors import InputError
from galerne.progress import say

if TYPE_CHECKING:
    from galerne.runtime.bench import BenchResult


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(bench)


def bench(
    bundle: BundlePath,
    engine: Annotated[str | None, typer.Option(help="The engine; by default the one that `generate` takes.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 512,
    decode_tokens: Annotated[int, typer.Option(help="Tokens to decode after it.", min=1)] = 40,
    adapter: RunAdapter = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE",
            help="Decode by turns with another bundle, such as the fp16 one, and warn if that is faster.",
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure prefill, decode, load and memory, beside the bound that memory bandwidth sets."""
    from galerne.runtime.bench import bench as run
    from galerne.runtime.bench import bench_beside
    from galerne.runtime.model import Model

    if adapter is not None and beside is not None:
        raise InputError("--adapter and --beside: measure one at a time")
    model = Model.open(bundle, engine, threads=threads)
    result = run(
        model,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        adapter=None if adapter is None else model.load_adapter(adapter),
    )
    bound = "" if result.bound_tokens_per_s is None else _bound(result)
    text = (
        f"engine   {result.engine}\n"
        f"prefill  {result.prefill_tokens_per_s:.1f} tokens/s over {result.prompt_tokens}\n"
        f"decode   {result.decode_tokens_per_s:.1f} tokens/s{bound}\n"
        f"load     {result.load_s:.2f} s\n"
        f"memory   {size(result.peak_rss_bytes)} at its peak"
    )
    data = dataclasses.asdict(result)
    if beside is not None:
        # After all else was measured, so that the other's memory is in none of it.
        with Model.open(beside, threads=threads) as other:
            turns = bench_beside(model, other, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens)
        rates = f"{turns.decode_tokens_per_s:.1f} tokens/s to {beside}'s {turns.beside_tokens_per_s:.1f}"
        text += f"\nbeside   {rates}, decoding by turns"
        data |= {"beside": dataclasses.asdict(turns), "slower_than_beside": turns.slower}
        if turns.slower:
            say(f"warning: {bundle} decodes slower than {beside}: {rates}")
    emit(json, data, text)


def _bound(result: "BenchResult") -> str:
    assert result.bound_tokens_per_s is not None and result.bandwidth_bytes_per_s is not None
    share = result.decode_tokens_per_s / result.bound_tokens_per_s
    return f", {share:.0%} of the bound of {result.bound_tokens_per_s:.1f} that {result.bandwidth_bytes_per_s / 1e9:.1f} GB/s set"
