"""What the comparison with other tools rests on: the same weights for all, and sizes that are counted rightly."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from gguf import GGMLQuantizationType

from benchmarks import child
from benchmarks.gguf_file import write_gguf
from benchmarks.graph_feeds import feeds
from benchmarks.product_bits import product_bits
from benchmarks.quality_rows import HEADS, Row, measured, table
from galerne.errors import BackendError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.runtime.model import Model

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"
Bundles = Callable[[str], Bundle]


def test_the_gguf_file_holds_the_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    source, out = open_checkpoint(TINY), tmp_path / "float.gguf"
    write_gguf(source, out, GGMLQuantizationType.F32)
    written = open_checkpoint(out)
    assert written.shapes().keys() == source.shapes().keys()
    for name in source.shapes():
        assert np.array_equal(written.read(name), source.read(name).astype(np.float32)), name


@pytest.mark.parametrize(("recipe", "bits"), [("fp16", 16), ("int4-rtn", 4 + 16 / 128)])
def test_bits_of_the_products_count_scales(recipe: str, bits: float, tiny_bundle_of: Bundles) -> None:
    assert product_bits(tiny_bundle_of(recipe)) == bits


def test_int8_has_a_scale_for_each_output(tiny_bundle_of: Bundles) -> None:
    hidden, width, heads = 256, 640, 384
    outputs = heads + hidden + 2 * width + hidden
    weights = hidden * heads + hidden * hidden + hidden * 2 * width + width * hidden
    assert product_bits(tiny_bundle_of("int8")) == 8 + 16 * outputs / weights


def test_the_graph_alone_says_what_the_runtime_says(tiny_bundle_of: Bundles) -> None:
    bundle = tiny_bundle_of("fp32")
    ids = np.random.default_rng(0).integers(3, 2048, 300)  # past the window of 128
    session = onnxruntime.InferenceSession(str(bundle.file(GRAPH)))
    (found,) = session.run(["logits"], feeds(session.get_inputs(), ids))
    with Model.open(bundle.path, "portable", exact=True) as model:
        expected = np.concatenate(model.rows().feed_all([ids]))
    np.testing.assert_allclose(found[0], expected, atol=2e-4)


def test_logits_are_measured_as_they_come_from_a_child(tmp_path: Path) -> None:
    """A child that gives the source's own logits costs nothing; half of them are not enough; one that fails is an error."""
    logits = np.random.default_rng(0).standard_normal((2, 8, 32)).astype(np.float32)
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "ids.npy", np.zeros((2, 8), np.int64))
    (tmp_path / "raw").write_bytes(logits.tobytes())
    code = "import sys; open(sys.argv[2], 'wb').write(open(sys.argv[1], 'rb').read()); print('made')"
    command: list[str | Path] = [sys.executable, "-c", code, tmp_path / "raw"]
    found, said = child.stream(command, lambda pipe: measured(tmp_path, pipe))
    assert said == "made\n"
    assert found == {"perplexity_ratio": 1.0, "mean_kl": 0.0, "p99_kl": 0.0, "top1_agreement": 1.0}
    assert measured(tmp_path, io.BytesIO(logits[:1].tobytes())) is None
    with pytest.raises(BackendError, match="ended with status 1: .*no-such-file"):
        child.stream([*command[:-1], tmp_path / "no-such-file"], lambda pipe: pipe.read())


def test_a_row_is_made_once(tmp_path: Path) -> None:
    made = Row("Galerne int4", 0.05, 0.5, 1.02, 0.9, 3_100_000, 4.125, 7.0)
    calls = []
    for _ in range(2):
        row = Row.kept(tmp_path / "row.json", lambda: calls.append(1) or made)  # type: ignore[func-returns-value]
        assert row == made
    assert calls == [1]
    assert json.loads((tmp_path / "row.json").read_text())["product_bits"] == 4.125
    last = table([made]).splitlines()[-1]
    assert last == "| Galerne int4 | 0.05 | 0.5 | ×1.0200 | 90.0% | 3.1 | 4.12 | 7 |"
    assert last.count("|") == len(HEADS) + 1
