"""Opens a checkpoint by what is found at a path."""

from pathlib import Path

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.safetensors_folder import SafetensorsCheckpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder of safetensors, or a GGUF file.

    Headers are read and checked; weights are mapped and not read.

    Raises: InputError naming the file and what is wrong with it.
    """
    if path.is_dir():
        if not (path / "config.json").is_file() and (found := sorted(path.glob("*.gguf"))):
            raise InputError(f"{path}: no config.json in it, but a GGUF file; give that file: {found[0]}")
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf" and path.is_file():
        # The gguf package is wanted for GGUF only.
        from galerne.export.checkpoint.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    found_text = f"a {path.suffix or 'plain'} file" if path.exists() else "nothing"
    raise InputError(f"{path}: found {found_text}; expected a folder with config.json and safetensors, or a .gguf file")
