"""Train a small Mistral on Python's standard library, on a CPU, to a wall-clock budget; or measure the checkpoint.

python train.py                  # 25 minutes; writes the checkpoint beside this file
python train.py --evaluate       # prints the measurements as JSON
"""

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from corpus import encode_documents, held_out_text, read_modules, to_rows, train_tokenizer
from evaluate import evaluate
from transformers import MistralConfig, MistralForCausalLM

logger = logging.getLogger("tiny-mistral")

VOCAB_SIZE = 2048
BETAS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.95), 0.1, 1.0
WARMUP = 0.02  # of the budget
REPORT_SECONDS = 20.0


def make_config() -> MistralConfig:
    """The model's shape: about 3.7 million parameters, and a window far shorter than its positions."""
    return MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=128,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def make_model(config: MistralConfig) -> MistralForCausalLM:
    """A model with fresh weights whose attention is PyTorch's scaled_dot_product_attention."""
    model = MistralForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model


def check_window(config: MistralConfig) -> None:
    """Raise RuntimeError unless attention is windowed: one layer's logits see token 0 up to position window - 1 only."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = 1
    model = make_model(shallow).eval()
    window = config.sliding_window or 0
    ids = torch.full((2, window + 32), 7)
    ids[1, 0] = 8
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits  # [2, window + 32, vocab]
    seen = (logits[0] != logits[1]).any(dim=-1)
    if not bool(seen[window - 1]) or bool(seen[window:].any()):
        raise RuntimeError(
            f"token 0 reaches position {int(seen.nonzero().max())}; with a window of {window} it ends at {window - 1}"
        )


def batches(stream: torch.Tensor, size: int, length: int, bos_token_id: int) -> Iterator[torch.Tensor]:
    """Yield shuffled rows [size, length] int64 for ever; each pass cuts the stream at another offset."""
    generator = torch.Generator().manual_seed(0)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        rows = to_rows(stream[offset:], length, bos_token_id)
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]


def make_optimizers(model: MistralForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, its update scaled to AdamW's size so that one `lr` serves both; AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}],
            lr=lr,
            betas=BETAS,
        ),
    ]


def lr_scale(spent: float) -> float:
    """The learning rate's factor at a share of the budget, 0..1: a short warmup, then a cosine down to zero."""
    return min(1.0, (spent + 1e-3) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(spent, 1.0)))


def fit(model: MistralForCausalLM, rows: Iterator[torch.Tensor], minutes: float, lr: float) -> None:
    """Train in place until the wall-clock budget is spent; bfloat16 autocast where the CPU multiplies it natively."""
    bf16 = torch.cpu._is_avx512_bf16_supported()
    optimizers = make_optimizers(model, lr)
    start = reported = time.monotonic()
    steps = tokens = 0
    while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_scale(spent)
        ids = next(rows)  # [B, T]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [B, T - 1, vocab]
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        steps, tokens, now = steps + 1, tokens + ids.numel(), time.monotonic()
        if now - reported >= REPORT_SECONDS:
            reported = now
            logger.info(
                "%4.1f min  step %d  %.2f M tokens  %.0f tokens/s  loss %.3f",
                (now - start) / 60,
                steps,
                tokens / 1e6,
                tokens / (now - start),
                loss.item(),
            )
    logger.info("done: %d steps, %.2f M tokens, bf16 autocast %s", steps, tokens / 1e6, bf16)


def train(folder: Path, minutes: float, batch: int, length: int, lr: float) -> None:
    """Train the tokenizer and the model, and write the checkpoint (bfloat16) and held-out.txt into a folder."""
    torch.manual_seed(0)
    train_texts, held_out = read_modules()
    tokenizer = train_tokenizer(train_texts, VOCAB_SIZE)
    stream = encode_documents(tokenizer, train_texts)
    config = make_config()
    check_window(config)
    model = make_model(config).train()
    logger.info(
        "%d modules, %.2f M tokens; %.2f M parameters",
        len(train_texts),
        len(stream) / 1e6,
        sum(p.numel() for p in model.parameters()) / 1e6,
    )
    fit(model, batches(stream, batch, length, cast(int, tokenizer.bos_token_id)), minutes, lr)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "held-out.txt").write_text(held_out_text(held_out), encoding="utf-8")


def main() -> None:
    """Parse the command line and train or measure."""
    parser = argparse.ArgumentParser(description="Train a small Mistral on Python's standard library, or measure it.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the checkpoint's folder")
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint and print JSON")
    parser.add_argument("--minutes", type=float, default=25.0, help="wall-clock budget of the training")
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    if args.evaluate:
        print(json.dumps(evaluate(args.out), indent=2))
    else:
        train(args.out, args.minutes, args.batch, args.length, args.lr)


if __name__ == "__main__":
    main()
