"""The rows of the quality table: what one tool's way of quantizing one model costs and takes."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from galerne.export.quality.distance import Distance, distance
from galerne.export.quality.report import judge
from galerne.export.quality.thresholds import Thresholds

HEADS = ("", "mean KL", "p99 KL", "perplexity", "top-1", "MB", "bits", "s")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    mean_kl, p99_kl: KL(source, quantized) in nats. perplexity_ratio: over the source's. top1_agreement: a share.
    size_bytes: of the whole model, embedding and vocabulary projection included.
    product_bits: bits that a weight of the layers' products takes on average, scales and zero points included.
    seconds: to quantize; for Galerne to write the bundle too.
    """

    tool: str
    mean_kl: float
    p99_kl: float
    perplexity_ratio: float
    top1_agreement: float
    size_bytes: int
    product_bits: float
    seconds: float

    @classmethod
    def kept(cls, path: Path, make: Callable[[], "Row"]) -> "Row":
        """Return the row that a file holds; make it and write it where there is none."""
        if not path.is_file():
            path.write_text(json.dumps(dataclasses.asdict(make())), "utf-8")
        return cls(**json.loads(path.read_text("utf-8")))

    def cells(self) -> list[str]:
        """Return the row as the table prints it."""
        return [
            self.tool,
            f"{self.mean_kl:.3g}",
            f"{self.p99_kl:.3g}",
            f"×{self.perplexity_ratio:.4f}",
            f"{self.top1_agreement:.1%}",
            f"{self.size_bytes / 1e6:.1f}",
            f"{self.product_bits:.2f}",
            f"{self.seconds:.0f}",
        ]


def measured(folder: Path, logits: BinaryIO) -> dict[str, Any] | None:
    """Hold logits against the source's in a folder; return a row's measures of them, None if there are not enough.

    Args:
        logits: float32 bytes, [sequences, length, vocab_size], read to their end.
    """
    ids, source = np.load(folder / "ids.npy"), np.load(folder / "logits.npy", mmap_mode="r")
    parts = []
    for tokens, expected in zip(ids, source, strict=True):
        found = np.frombuffer(logits.read(expected.nbytes), np.float32)
        if found.size != expected.size:
            return None
        parts.append(distance(tokens, expected, found.reshape(expected.shape)))
    report = judge(Distance.join(parts), Thresholds())
    ratio = report["perplexity"] / report["source_perplexity"]
    return {"perplexity_ratio": ratio, **{key: report[key] for key in ("mean_kl", "p99_kl", "top1_agreement")}}


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table of Markdown."""
    lines = [HEADS, ("---",) * len(HEADS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
