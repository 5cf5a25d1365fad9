"""Measure a checkpoint on held-out.txt, beside a unigram model, and let it continue a prompt."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from corpus import encode_documents, read_modules
from transformers import AutoTokenizer, MistralForCausalLM, PreTrainedTokenizerFast

LENGTH = 1024
BATCH = 8
BUCKETS = ((0, 128), (128, 512), (512, 1024))
PROMPT = "def read_lines(path):\n"


def token_losses(model: MistralForCausalLM, ids: torch.Tensor, bos_token_id: int) -> torch.Tensor:
    """Score every token of a text, in rows of LENGTH positions that each begin with <s>.

    Args:
        ids: [tokens] int64, without <s>.
    Returns: [rows, LENGTH - 1] float32 nats; column i is predicted at position i; NaN past the end of the text.
    """
    width = LENGTH - 1
    rows = -(-len(ids) // width)
    targets = torch.nn.functional.pad(ids, (0, rows * width - len(ids)), value=-100).view(rows, width)
    inputs = torch.cat([targets.new_full((rows, 1), bos_token_id), targets[:, :-1].clamp(min=0)], dim=1)
    losses = []
    with torch.inference_mode():
        for batch, wanted in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
            logits = model(input_ids=batch, use_cache=False).logits.float()  # [B, LENGTH - 1, vocab]
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"))
    return torch.cat(losses).masked_fill(targets == -100, math.nan)


def unigram_losses(train: torch.Tensor, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Score tokens by their share of the train split, add-one smoothed. Returns: [tokens] float32 nats."""
    counts = torch.bincount(train, minlength=vocab_size) + 1
    return -(counts / counts.sum()).log()[ids]


def evaluate(folder: Path) -> dict[str, Any]:
    """Measure the checkpoint in a folder on the held-out.txt beside it, computing in float32.

    Returns: a JSON-able record; perplexities are per token, with the tokens' bits spread over the text's UTF-8 bytes.
    """
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))
    model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (folder / "held-out.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    train = encode_documents(tokenizer, read_modules()[0])
    text_bytes = len(text.encode())

    losses = token_losses(model, ids, cast(int, tokenizer.bos_token_id))

    def summary(nats: torch.Tensor) -> dict[str, float]:
        total = float(nats.double().sum())
        return {
            "perplexity": round(math.exp(total / len(ids)), 2),
            "bits_per_byte": round(total / math.log(2) / text_bytes, 3),
        }

    return {
        "held_out_bytes": text_bytes,
        "held_out_tokens": len(ids),
        "model": summary(losses[~losses.isnan()]),
        "unigram": summary(unigram_losses(train, ids, model.config.vocab_size)),
        "perplexity_by_position": {
            f"{start}-{end}": round(math.exp(float(losses[:, start:end].nanmean())), 2) for start, end in BUCKETS
        },
        "greedy": continue_prompt(model, tokenizer, temperature=0.0),
        "temperature 0.8": continue_prompt(model, tokenizer, temperature=0.8),
    }


def continue_prompt(
    model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float, new_tokens: int = 120
) -> str:
    """Continue PROMPT by up to `new_tokens` tokens; temperature 0 is greedy. Returns: the prompt and its continuation."""
    torch.manual_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = cast(Any, model).generate(**inputs, max_new_tokens=new_tokens, pad_token_id=tokenizer.eos_token_id, **how)
    return cast(str, tokenizer.decode(output[0], skip_special_tokens=True))
