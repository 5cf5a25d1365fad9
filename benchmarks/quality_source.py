"""Writes what all tools are fed, and what the source says of it: `python -m benchmarks.quality_source BUNDLE CHECKPOINT OUT`.

OUT holds `ids.npy` [sequences, length] and `calibration.npy`, int64, cut as `galerne quality` cuts them, and `logits.npy`
[sequences, length, vocab_size] float32 of transformers on the unrounded weights. They are computed once for all tools.
"""

import argparse
from pathlib import Path

import numpy as np

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.parity.streamed import StreamedModel
from galerne.export.quality.quality import source_logits
from galerne.export.text import sequences
from galerne.optimize.quantize.recipe import Calibration
from galerne.runtime.bundle import Bundle
from galerne.runtime.tokenizer import Tokenizer

IDS, CALIBRATION, LOGITS = "ids.npy", "calibration.npy", "logits.npy"


def main() -> None:
    """Write the three files, the logits last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    tokenizer = Tokenizer.open(bundle)
    ids = sequences(tokenizer, args.text, args.length, args.tokens)
    np.save(args.out / IDS, ids)
    amount = Calibration()
    np.save(args.out / CALIBRATION, sequences(tokenizer, args.calibration, amount.length, amount.tokens))
    staging = args.out / f".{LOGITS}"
    vocab_size = bundle.manifest.model.vocab_size
    logits = np.lib.format.open_memmap(staging, "w+", np.float32, (*ids.shape, vocab_size))
    for number, (_, row) in enumerate(source_logits(StreamedModel(open_checkpoint(args.checkpoint)), ids, vocab_size)):
        logits[number] = row
    logits.flush()
    staging.rename(args.out / LOGITS)


if __name__ == "__main__":
    main()
