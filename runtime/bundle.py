"""A bundle on disk: opening it, checking it, and adding to it.

A bundle holds no code and nothing of it is executed; no path in its manifest may leave its folder.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from galerne import schema
from galerne.errors import InputError
from galerne.files import sha256_file, write_atomic
from galerne.runtime.manifest import FileEntry, Manifest, Verdict, parse

MANIFEST = "manifest.json"
GRAPH = "model.onnx"
WEIGHTS = "weights.bin"
TOKENIZER = "tokenizer.json"
ENGINES = "engines"
REPORTS = "reports"


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: Path) -> "Bundle":
        """Open a bundle and check that every file of its manifest is there with the size it should have.

        Hashes are not read here, since that would read all weights: see `verify_hashes`.

        Raises: InputError if the folder is no bundle, or a file is missing, of another size, or outside of the folder.
        """
        file = path / MANIFEST
        if not path.is_dir():
            raise InputError(f"{path}: no such bundle folder")
        if not file.is_file():
            raise InputError(f"{path}: no {MANIFEST} in it, so it is not a bundle; make one with `galerne export`")
        bundle = Bundle(path, parse(file.read_bytes(), str(file)))
        for name, entry in bundle.manifest.files.items():
            size = _stat(bundle.file(name))
            if size != entry.size:
                found = "no such file" if size is None else f"{size} bytes"
                raise InputError(f"{path / name}: expected {entry.size} bytes, found {found}; copy the bundle again")
        return bundle

    def file(self, name: str) -> Path:
        """Return the path of a file of the bundle. Raises: InputError if the name leads out of the bundle."""
        parts = PurePosixPath(name)
        try:
            inside = (self.path / parts).resolve().is_relative_to(self.path.resolve())
        except (ValueError, OSError, RuntimeError) as exc:  # a zero byte, too long, links in a circle
            raise InputError(f"{self.path / MANIFEST}: files: {name!r} is no file name") from exc
        if parts.is_absolute() or ".." in parts.parts or not inside:
            raise InputError(f"{self.path / MANIFEST}: files: {name!r} leads out of the bundle")
        return self.path / parts

    def verify_hashes(self, names: Iterable[str] | None = None) -> None:
        """Read the files (all of them by default) and compare each SHA-256. Raises: InputError on the first that differs."""
        for name in self.manifest.files if names is None else names:
            expected = self.manifest.files[name].sha256
            found = sha256_file(self.file(name)) if self.file(name).is_file() else "no such file"
            if found != expected:
                raise InputError(
                    f"{self.path / name}: its SHA-256 is {found[:12]}…, the manifest says {expected[:12]}…: the file was changed"
                )

    def fingerprint(self) -> str:
        """Return a hex SHA-256 that stands for what the bundle computes: its model, graph and weights.

        Not of the whole manifest, which changes when an engine or a verdict is added.
        """
        facts = [schema.tree(facts) for facts in (self.manifest.model, self.manifest.graph)]
        hashes = [self.manifest.files[name].sha256 for name in (GRAPH, WEIGHTS) if name in self.manifest.files]
        return hashlib.sha256(json.dumps([*facts, *hashes], sort_keys=True).encode()).hexdigest()

    def engines(self) -> list[str]:
        """Return the names of the engines that were built into the bundle."""
        parts = [PurePosixPath(name).parts for name in self.manifest.files]
        return sorted({part[1] for part in parts if len(part) == 3 and part[0] == ENGINES})

    def with_files(self, folder: str, files: Iterable[str]) -> "Bundle":
        """Record that `folder` now holds exactly `files` (paths in the bundle), and write the manifest."""
        kept = {name: entry for name, entry in self.manifest.files.items() if not name.startswith(folder + "/")}
        kept.update({name: entry_of(self.file(name)) for name in files})
        return self._rewrite(dataclasses.replace(self.manifest, files=kept))

    def with_verdict(self, engine: str, report: bytes, passed: bool) -> "Bundle":
        """Write a parity report and enter its verdict into the manifest."""
        return self._with_report("parity", self.manifest.parity, engine, report, passed)

    def with_quality(self, engine: str, report: bytes, passed: bool) -> "Bundle":
        """Write a quality report and enter its verdict into the manifest."""
        return self._with_report("quality", self.manifest.quality, engine, report, passed)

    def _with_report(
        self, kind: str, verdicts: dict[str, Verdict], engine: str, report: bytes, passed: bool
    ) -> "Bundle":
        name = f"{REPORTS}/{kind}-{engine}.json"
        self.file(REPORTS).mkdir(exist_ok=True)
        write_atomic(self.file(name), report)
        changed: dict[str, Any] = {
            "files": {**self.manifest.files, name: entry_of(self.file(name))},
            kind: {**verdicts, engine: Verdict(passed, name)},
        }
        return self._rewrite(dataclasses.replace(self.manifest, **changed))

    def _rewrite(self, manifest: Manifest) -> "Bundle":
        write_atomic(self.path / MANIFEST, manifest.to_json())
        return Bundle(self.path, manifest)


def entry_of(path: Path, advance: Callable[[int], None] = lambda _: None) -> FileEntry:
    """Return the manifest's entry for a file: its hash and its size. `advance` as in `sha256_file`."""
    return FileEntry(sha256_file(path, advance), path.stat().st_size)


def _stat(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
