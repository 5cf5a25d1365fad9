"""`galerne generate`: text from a prompt, streamed."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from galerne.cli.output import BundlePath, Json, RunAdapter, Threads, emit
from galerne.errors import InputError
from galerne.progress import say


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command()(generate)


def generate(
    bundle: BundlePath,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with that text.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids in place of text, as in 1,2,3.")] = None,
    chat: Annotated[str | None, typer.Option(help="A message to answer, through the model's chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely tokens that sum to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens at least p times as likely as the first.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    speculate: Annotated[
        int,
        typer.Option(help="Guess up to this many tokens from the text and check them at once; same output. 0: none."),
    ] = 0,
    engine: Annotated[
        str | None, typer.Option(help='"portable" or an engine; by default the `cpu` engine if there is one.')
    ] = None,
    adapter: RunAdapter = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Generate text, streamed to stdout."""
    from galerne.runtime.bench import peak_rss_bytes
    from galerne.runtime.generate import Generation, TextGeneration
    from galerne.runtime.model import Model
    from galerne.runtime.prompt import Prompt, prompt_tokens
    from galerne.runtime.sampling import SamplingOptions
    from galerne.runtime.tokenizer import Tokenizer

    given = Prompt(text=prompt, file=prompt_file, ids=prompt_ids, chat=chat)
    sampling = SamplingOptions(temperature, top_k, top_p, min_p, seed)
    model = Model.open(bundle, engine, threads=threads)
    has_tokenizer = "tokenizer.json" in model.bundle.manifest.files
    if stop and not has_tokenizer:
        raise InputError(f"{bundle}: --stop needs a tokenizer, and the bundle has none")
    ids = prompt_tokens(model.bundle, given)
    generation = Generation(
        model,
        [ids],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        speculate=speculate,
        adapter=None if adapter is None else model.load_adapter(adapter),
    )
    text = None
    if has_tokenizer:
        writer = TextGeneration(generation, Tokenizer.open(model.bundle), stop or ())
        for piece in writer:
            if not json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        text = writer.text
    else:
        for _ in generation:
            pass
    output, timings = generation.outputs[0], generation.timings
    rates = {
        "load_s": model.load_s,
        "prefill_tokens_per_s": timings.prefill_tokens_per_s,
        "decode_tokens_per_s": timings.decode_tokens_per_s,
        "drafted_tokens": timings.drafted_tokens,
    }
    data = {
        "prompt_ids": ids,
        "output_ids": output.ids,
        "text": text,
        "stop_reason": output.stop_reason,
        "timings": rates,
        "peak_rss_bytes": peak_rss_bytes(),
        "engine": model.engine.name,
    }
    emit(json, data, "" if text is not None else ",".join(map(str, output.ids)))
    if not json:
        say(
            f"[{model.engine.name}: {len(output.ids)} tokens, stopped by {output.stop_reason}; prefill "
            f"{timings.prefill_tokens_per_s:.1f}, decode {timings.decode_tokens_per_s:.1f} tokens/s; load {model.load_s:.2f} s; "
            f"{peak_rss_bytes() / 1e6:.0f} MB]"
        )
