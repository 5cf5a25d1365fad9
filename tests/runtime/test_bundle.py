"""A bundle that is damaged, incomplete or leads out of its folder is refused, and each change to one is recorded whole."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from galerne.errors import InputError
from galerne.runtime.bundle import GRAPH, MANIFEST, WEIGHTS, Bundle, entry_of
from galerne.runtime.manifest import SCHEMA_VERSION, FileEntry, GraphFacts, Manifest, ModelFacts, Source

CONTENT = {
    GRAPH: b"graph",
    WEIGHTS: bytes(range(256)) * 8,
    "engines/cpu/engine.json": b"{}",
    "engines/l4/engine.json": b"{}",
    "reports/quality.json": b"[]",
}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    path = tmp_path / "bundle"
    for name, data in CONTENT.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    model = ModelFacts("MistralForCausalLM", 2, 64, 128, 4, 2, 16, 256, (32, 32), 1e4, 512, False, 1, (2,))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        galerne_version="0.1.0",
        source=Source("safetensors", {}),
        model=model,
        graph=GraphFacts("opset24", 24, "float16", 16, (48,), None),
        recipe={},
        tools={},
        files={name: entry_of(path / name) for name in CONTENT},
    )
    return _with(Bundle(path, manifest), manifest.files)


def _with(bundle: Bundle, files: dict[str, FileEntry]) -> Bundle:
    manifest = dataclasses.replace(bundle.manifest, files=files)
    (bundle.path / MANIFEST).write_bytes(manifest.to_json())
    return Bundle(bundle.path, manifest)


def test_open_and_hashes_of_a_good_bundle(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.path)
    assert opened == bundle
    opened.verify_hashes()
    assert opened.file(WEIGHTS).read_bytes() == CONTENT[WEIGHTS]
    assert opened.engines() == ["cpu", "l4"]


def test_open_takes_a_relative_path_and_a_symlinked_folder(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.path.parent)
    os.symlink("bundle", "link")
    for name in ["bundle", "link"]:
        Bundle.open(Path(name)).verify_hashes()


def test_open_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: no such bundle folder"):
        Bundle.open(tmp_path / "none")
    with pytest.raises(InputError, match=r"no manifest.json in it, so it is not a bundle; make one with"):
        Bundle.open(tmp_path)


def test_damaged_manifest_is_named(bundle: Bundle) -> None:
    (bundle.path / MANIFEST).write_bytes(b"{")
    with pytest.raises(InputError, match=r"bundle/manifest.json: not JSON"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", CONTENT)
def test_missing_file(bundle: Bundle, name: str) -> None:
    (bundle.path / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: expected {len(CONTENT[name])} bytes, found no such file; copy"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("change", "found"), [(lambda data: data[:-1], 2047), (lambda data: data + b"x", 2049), (lambda data: b"", 0)]
)
def test_file_of_another_size(bundle: Bundle, change: Callable[[bytes], bytes], found: int) -> None:
    (bundle.path / WEIGHTS).write_bytes(change(CONTENT[WEIGHTS]))
    with pytest.raises(InputError, match=rf"weights.bin: expected 2048 bytes, found {found} bytes"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("place", [0, 1000, 2047])
def test_one_changed_byte_is_found(bundle: Bundle, place: int) -> None:
    data = bytearray(CONTENT[WEIGHTS])
    data[place] ^= 1
    (bundle.path / WEIGHTS).write_bytes(data)
    opened = Bundle.open(bundle.path)
    with pytest.raises(InputError, match=r"weights.bin: its SHA-256 is .*: the file was changed"):
        opened.verify_hashes()
    opened.verify_hashes([GRAPH])


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../outside", "reports/../../outside", "reports/../model.onnx", "..", "link", "folder/f"]
)
def test_no_path_leads_out(bundle: Bundle, name: str) -> None:
    """Absolute, through .. (even when it comes back in), through a link to a file, and through a link to a folder."""
    outside = bundle.path.parent / "outside"
    outside.write_bytes(b"secret")
    (bundle.path.parent / "other").mkdir()
    (bundle.path.parent / "other" / "f").write_bytes(b"secret")
    os.symlink("../outside", bundle.path / "link")
    os.symlink("../other", bundle.path / "folder")
    changed = _with(bundle, {**bundle.manifest.files, name: entry_of(outside)})
    with pytest.raises(InputError) as caught:
        Bundle.open(bundle.path)
    assert str(caught.value).endswith(f"manifest.json: files: {name!r} leads out of the bundle")
    with pytest.raises(InputError, match="leads out"):
        changed.file(name)


def test_link_that_stays_inside_is_fine(bundle: Bundle) -> None:
    os.symlink(WEIGHTS, bundle.path / "again.bin")
    files = {**bundle.manifest.files, "again.bin": bundle.manifest.files[WEIGHTS]}
    _with(bundle, files)
    Bundle.open(bundle.path).verify_hashes()


@pytest.mark.parametrize("name", [".", "", "reports"])
def test_folder_is_no_file(bundle: Bundle, name: str) -> None:
    _with(bundle, {name: FileEntry("a" * 64, 0)})
    with pytest.raises(InputError, match="expected 0 bytes, found no such file"):
        Bundle.open(bundle.path)


def test_with_files_replaces_the_entries_of_one_folder(bundle: Bundle) -> None:
    (bundle.path / "engines/cpu/model.bin").write_bytes(b"new")
    changed = bundle.with_files("engines/cpu", ["engines/cpu/model.bin"])
    assert "engines/cpu/engine.json" not in changed.manifest.files
    assert changed.manifest.files["engines/cpu/model.bin"].size == 3
    assert changed.manifest.files["engines/l4/engine.json"] == bundle.manifest.files["engines/l4/engine.json"]
    assert Bundle.open(bundle.path) == changed


def test_with_verdict_writes_the_report_and_enters_it(bundle: Bundle) -> None:
    changed = bundle.with_verdict("cpu", b'{"passed": false}', passed=False)
    assert changed.manifest.parity["cpu"].passed is False
    assert changed.file(changed.manifest.parity["cpu"].report).read_bytes() == b'{"passed": false}'
    opened = Bundle.open(bundle.path)
    assert opened == changed
    opened.verify_hashes()


def test_manifest_on_disk_lists_no_file_twice_and_not_itself(bundle: Bundle) -> None:
    bundle.with_verdict("portable", b"{}", passed=True).with_verdict("portable", b"[]", passed=True)
    names = json.loads((bundle.path / MANIFEST).read_bytes())["files"]
    assert sorted(names) == sorted([*CONTENT, "reports/parity-portable.json"])
