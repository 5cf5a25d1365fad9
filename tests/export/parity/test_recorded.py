"""A recorded parity set: right bundles pass it without PyTorch, faulty ones do not."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import galerne.export.export
from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.safetensors_folder import SafetensorsCheckpoint
from galerne.export.export import export
from galerne.export.families.registry import read_spec
from galerne.export.parity.recorded import record
from galerne.export.reader import ConfigReader
from galerne.export.rotary import read_rotary
from galerne.export.spec import DecoderSpec
from galerne.optimize.builders.build import build
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.runtime.recorded import Recording, Replay, replay
from galerne.targets import target

WINDOW, CHUNK = 16, 8
PRECISIONS = ["fp32", pytest.param("fp16", marks=pytest.mark.slow), "int4-rtn"]

BundleOf = Callable[[str], Bundle]
RecordingOf = Callable[[str], Recording]


@pytest.fixture(scope="session")
def recording_of(mistral: Checkpoint, bundle_of: BundleOf) -> RecordingOf:
    """Return the recording for the shared bundle of a recipe."""
    made: dict[str, Recording] = {}

    def get(name: str) -> Recording:
        if name not in made:
            made[name] = record(bundle_of(name), mistral)
        return made[name]

    return get


def _failed(found: Replay) -> dict[str, tuple[str, ...]]:
    assert found.passed == all(case.passed for case in found.cases)
    return {case.name: case.failures for case in found.cases if not case.passed}


def _replay_faulty(recording: Recording, bundle: Bundle) -> dict[str, tuple[str, ...]]:
    """Replay on a bundle that is not the recording's own, as if an exporter's fault had made it so."""
    facts = dataclasses.replace(recording.facts, bundle=bundle.fingerprint())
    return _failed(replay(dataclasses.replace(recording, facts=facts), bundle))


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_right_bundle_passes(bundle_of: BundleOf, recording_of: RecordingOf, name: str) -> None:
    recording = recording_of(name)
    found = replay(recording, bundle_of(name))
    assert not _failed(found)
    assert [case.name for case in found.cases] == [
        "prompt of 17",
        "uneven chunks over the ring's end",
        "greedy tokens one by one over the edge",
    ]
    assert {WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + CHUNK} <= set(recording.positions.tolist())
    assert max(len(case.steps) for case in recording.facts.cases) == 33


@pytest.mark.parametrize("name", PRECISIONS)
def test_most_greedy_tokens_count(recording_of: RecordingOf, name: str) -> None:
    recording = recording_of(name)
    clear = recording.margins > 2 * recording.facts.limits["portable"].max_abs
    assert clear.mean() > 0.5


def test_a_cpu_engine_passes_by_its_own_limits(bundle_of: BundleOf, recording_of: RecordingOf, tmp_path: Path) -> None:
    made = bundle_of("int4-rtn")
    copy = Bundle.open(Path(shutil.copytree(made.path, tmp_path / "bundle")))
    found = replay(recording_of("int4-rtn"), build(copy, target.load("cpu")), "cpu")
    assert not _failed(found)
    assert found.tolerances.max_abs > recording_of("int4-rtn").facts.limits["portable"].max_abs


def test_without_a_window(llama: Checkpoint, tmp_path: Path) -> None:
    made = export(llama, recipe.load("fp16"), tmp_path / "bundle", chunk=8)
    assert not _failed(replay(record(made, llama), made))


def test_a_context_shorter_than_the_window(mistral: Checkpoint, tmp_path: Path) -> None:
    made = export(mistral, recipe.load("fp32"), tmp_path / "short", chunk=4, max_context=9)
    recording = record(made, mistral)
    assert len(recording.tokens) == 9
    assert not _failed(replay(recording, made))


class SwappedKeysAndValues(SafetensorsCheckpoint):
    """A checkpoint that gives keys for values and values for keys."""

    def read(self, name: str) -> NDArray[Any]:
        """Return the other tensor."""
        for part, wrong in {".k_proj.": ".v_proj.", ".v_proj.": ".k_proj."}.items():
            if part in name:
                return super().read(name.replace(part, wrong))
        return super().read(name)


@pytest.fixture
def faulty_spec(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the exporter misread a config."""

    def plant(**changes: Any) -> None:
        def misread(config: dict[str, Any], where: str) -> DecoderSpec:
            return dataclasses.replace(read_spec(config, where), **changes)

        monkeypatch.setattr(galerne.export.export, "read_spec", misread)

    return plant


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1, None])
def test_a_wrong_window_fails(
    mistral: Checkpoint,
    tmp_path: Path,
    recording_of: RecordingOf,
    faulty_spec: Callable[..., None],
    name: str,
    window: int | None,
) -> None:
    recording = recording_of(name)
    faulty_spec(layer_windows=(window,) * 2)
    failed = _replay_faulty(recording, export(mistral, recipe.load(name), tmp_path / "bundle", chunk=CHUNK))
    assert set(failed) == {case.name for case in recording.facts.cases}


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_wrong_rope_theta_fails(
    mistral: Checkpoint, tmp_path: Path, recording_of: RecordingOf, faulty_spec: Callable[..., None], name: str
) -> None:
    recording = recording_of(name)
    faulty_spec(layer_rotary=(read_rotary(ConfigReader({"rope_theta": 1e6}, "faulty"), head_dim=32),) * 2)
    failed = _replay_faulty(recording, export(mistral, recipe.load(name), tmp_path / "bundle", chunk=CHUNK))
    assert set(failed) == {case.name for case in recording.facts.cases}


@pytest.mark.parametrize("name", PRECISIONS)
def test_keys_and_values_swapped_fail(
    mistral: Checkpoint, tmp_path: Path, recording_of: RecordingOf, name: str
) -> None:
    recording = recording_of(name)
    made = export(SwappedKeysAndValues(mistral.path), recipe.load(name), tmp_path / "bundle", chunk=CHUNK)
    assert set(_replay_faulty(recording, made)) == {case.name for case in recording.facts.cases}


def test_a_wrong_greedy_token_fails(bundle_of: BundleOf, recording_of: RecordingOf) -> None:
    recording = recording_of("fp32")
    likeliest = recording.likeliest.copy()
    step = int(np.argmax(recording.margins))
    likeliest[step] = (likeliest[step] + 1) % 501
    failed = _failed(replay(dataclasses.replace(recording, likeliest=likeliest), bundle_of("fp32")))
    assert list(failed) == ["greedy tokens one by one over the edge"]
    assert failed["greedy tokens one by one over the edge"][0].startswith("1 of ")


def test_the_file_gives_back_what_was_written(recording_of: RecordingOf, tmp_path: Path) -> None:
    recording, file, again = recording_of("fp16"), tmp_path / "one", tmp_path / "two"
    recording.write(file)
    read = Recording.read(file)
    read.write(again)
    assert again.read_bytes() == file.read_bytes()
    np.testing.assert_array_equal(read.logits, recording.logits)
    assert dataclasses.replace(read.facts, sha256="") == recording.facts


def test_a_changed_file_is_refused(recording_of: RecordingOf, checkpoint_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recording"
    recording_of("fp16").write(file)
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(InputError, match="its SHA-256 is not the one it was written with"):
        Recording.read(file)
    file.write_bytes(good.replace(b'max_abs\\": ', b'max_abs\\": 9', 1))
    with pytest.raises(InputError, match="recording: "):
        Recording.read(file)
    with pytest.raises(InputError, match="it is no recorded parity set"):
        Recording.read(checkpoint_folder / "model.safetensors")


def test_another_bundle_is_refused(bundle_of: BundleOf, recording_of: RecordingOf) -> None:
    with pytest.raises(InputError, match="give the recording that was made for this bundle"):
        replay(recording_of("fp32"), bundle_of("fp16"))


def test_the_command_needs_no_pytorch(bundle_of: BundleOf, recording_of: RecordingOf, tmp_path: Path) -> None:
    file = tmp_path / "recording"
    recording_of("int4-rtn").write(file)
    block = "import sys\nfor name in ('torch', 'transformers', 'onnx', 'polygraphy'):\n    sys.modules[name] = None\n"
    command = [sys.executable, "-c", block + "from galerne.cli.main import run\nrun()", "verify"]
    run = [*command, str(bundle_of("int4-rtn").path), "--recorded", str(file), "--json"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] and len(found["cases"]) == 3
    recording = recording_of("int4-rtn")
    dataclasses.replace(recording, logits=recording.logits[::-1]).write(file)
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") <= 4 and "does not match its source" in done.stderr
