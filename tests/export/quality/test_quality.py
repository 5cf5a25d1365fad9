"""A bundle beside its source on real text: exact at float32, dearer with fewer bits, and refused beyond the limits."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from galerne.cli.main import run
from galerne.errors import InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.quality.quality import measure
from galerne.export.quality.report import QualityReport
from galerne.export.quality.thresholds import Thresholds, load
from galerne.runtime.bundle import GRAPH, Bundle, entry_of

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"
HELD_OUT = TINY / "held-out.txt"
TOKENS, LENGTH = 768, 384  # past the window, which is 128


def measured(bundle: Bundle, limits: Thresholds | None = None) -> QualityReport:
    return measure(bundle, open_checkpoint(TINY), HELD_OUT, limits=limits or Thresholds(), tokens=TOKENS, length=LENGTH)


def test_float32_costs_nothing_and_int4_more_than_int8(tiny_bundle_of: Callable[[str], Bundle]) -> None:
    wide, int8, int4 = (measured(tiny_bundle_of(name)) for name in ("fp32", "int8", "int4-rtn"))
    assert wide.mean_kl < 1e-6 and wide.top1_agreement > 0.999
    assert max(layer.total for layer in wide.layers) < 1e-5
    assert wide.perplexity == pytest.approx(wide.source_perplexity, rel=1e-4)
    assert wide.source_perplexity == int4.source_perplexity
    assert wide.mean_kl < int8.mean_kl < int4.mean_kl
    assert wide.size_bytes > int8.size_bytes > int4.size_bytes
    assert [layer.layer for layer in int4.layers] == list(range(len(int4.layers)))
    # What a layer adds is what one layer's rounding costs; what has come together is never less than the first one's.
    assert all(0.001 < layer.added < 0.3 for layer in int4.layers)
    assert int4.layers[0].total == int4.layers[0].added
    assert int4.layers[-1].total > int8.layers[-1].total


def test_the_limits_that_ship_are_kept_by_the_example(tiny_bundle: Bundle) -> None:
    limits = load(TINY.parent / "quality.toml")
    assert all(limit is not None for limit in vars(limits).values())
    report = measured(tiny_bundle, limits)
    assert report.passed, report.failures


def test_a_lost_window_shows(tiny_bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    """The planted fault changes nothing at short positions, and the text is longer than those."""
    good = tiny_bundle_of("fp32")
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in good.path.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    model = onnx.load(folder / GRAPH, load_external_data=False)
    window = good.manifest.model.layer_windows[0]
    found = 0
    for tensor in model.graph.initializer:
        small = tensor.data_type == onnx.TensorProto.INT64 and not tensor.external_data
        if small and (numpy_helper.to_array(tensor) == window).all():
            tensor.CopyFrom(numpy_helper.from_array(np.array(1 << 20), tensor.name))
            found += 1
    assert found == 1
    (folder / GRAPH).write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][GRAPH] = vars(entry_of(folder / GRAPH))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert measured(Bundle.open(folder)).mean_kl > 1e-3


def test_the_command_gates_and_enters_its_verdict(
    tiny_bundle_of: Callable[[str], Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    int4 = tiny_bundle_of("int4-rtn").path
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in int4.iterdir():
        (bundle / file.name).write_bytes(file.read_bytes())
    limits, page, beside = tmp_path / "limits.toml", tmp_path / "page.html", tmp_path / "beside.json"
    limits.write_text("max_mean_kl = 1e-6\n")
    common = [str(bundle), "--source", str(TINY), "--text", str(HELD_OUT), "--tokens", "512", "--length", "256"]

    assert status("quality", *common, "--json") == 0
    first = capsys.readouterr().out
    data = json.loads(first)
    assert data["passed"] and data["mean_kl"] > 0 and 0.3 < data["top1_agreement"] < 1
    assert Bundle.open(bundle).manifest.quality["portable"].passed
    beside.write_text(first)

    refused = status("quality", *common, "--thresholds", limits, "--html", page, "--beside", beside)
    captured = capsys.readouterr()
    assert refused == 1
    assert "its quality is not enough: mean_kl" in captured.err.splitlines()[-1]
    assert page.read_text().count("<svg") == 3
    verdict = Bundle.open(bundle).manifest.quality["portable"]
    assert not verdict.passed
    assert json.loads((bundle / verdict.report).read_text())["failures"]

    assert status("build", bundle, "--target", "cpu") == 1
    assert "its quality on text, run as portable, is not enough" in capsys.readouterr().err
    assert not (bundle / "engines").exists()
    assert status("build", bundle, "--target", "cpu", "--force") == 0


def status(*args: object) -> int:
    with pytest.raises(SystemExit) as left:
        run([str(arg) for arg in args])
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_kl = 1.0", "unknown key 'max_kl'; allowed: max_perplexity_ratio, max_mean_kl"),
        ("max_mean_kl = nan", "max_mean_kl: expected a finite number"),
        ("max_mean_kl = -1.0", "max_mean_kl: expected at least 0, found -1.0"),
        ("", "sets no limit; expected one of"),
        ("max_mean_kl =", "not TOML"),
    ],
)
def test_bad_limits_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load(file)


@pytest.mark.parametrize(("tokens", "length", "message"), [(100, 200, "from 2 to --tokens"), (100, 1, "from 2 to")])
def test_numbers_out_of_range_are_refused(tiny_bundle: Bundle, tokens: int, length: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(tiny_bundle, open_checkpoint(TINY), HELD_OUT, limits=Thresholds(), tokens=tokens, length=length)
