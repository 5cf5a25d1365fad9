"""The source's hashes: right, not far ahead of who reads it, and given up when the export is."""

import time
from pathlib import Path

import pytest

from galerne import files
from galerne.export.hashing import SourceHashes
from galerne.runtime.bundle import entry_of


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 100)
    made = [tmp_path / "a", tmp_path / "b"]
    for path in made:
        path.write_bytes(path.name.encode() * 1000)
    return made


def _settled(hashes: SourceHashes) -> int:
    """Return how many bytes were hashed once it goes no further."""
    before = -1
    while before != hashes._hashed:
        before = hashes._hashed
        time.sleep(0.1)
    return before


def test_entries_are_those_of_the_files(sources: list[Path]) -> None:
    with SourceHashes(sources) as hashes:
        assert hashes.entries() == {path.name: entry_of(path) for path in sources}


def test_it_keeps_a_little_ahead(sources: list[Path]) -> None:
    with SourceHashes(sources, lead_bytes=300) as hashes:
        assert _settled(hashes) == 400
        hashes.used(1000)
        assert _settled(hashes) == 1400
        assert hashes.entries() == {path.name: entry_of(path) for path in sources}


def test_leaving_ends_it(sources: list[Path]) -> None:
    with pytest.raises(RuntimeError, match="stop"), SourceHashes(sources, lead_bytes=300) as hashes:
        raise RuntimeError("stop")
    assert hashes._hashed <= 400


def test_a_file_that_is_gone_is_said(tmp_path: Path) -> None:
    with SourceHashes([tmp_path / "none"]) as hashes, pytest.raises(FileNotFoundError):
        hashes.entries()
