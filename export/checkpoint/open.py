"""Opens a checkpoint by what is found at a path."""

from pathlib import Path

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.consolidated import ConsolidatedCheckpoint, is_consolidated
from galerne.export.checkpoint.lora import AdaptedCheckpoint
from galerne.export.checkpoint.safetensors_folder import INDEX, WEIGHTS, SafetensorsCheckpoint


def open_checkpoint(path: Path, adapter: Path | None = None) -> Checkpoint:
    """Open a Hugging Face folder of safetensors, quantized or not, a folder in Mistral's own layout, or a GGUF file.

    Headers are read and checked; weights are mapped and not read.

    Args:
        adapter: the folder of a LoRA adapter to merge into the weights as they are read.

    Raises: InputError naming the file and what is wrong with it.
    """
    if adapter is not None:
        return AdaptedCheckpoint(open_checkpoint(path), adapter)
    if path.is_dir():
        if not (path / "config.json").is_file() and (found := sorted(path.glob("*.gguf"))):
            raise InputError(f"{path}: no config.json in it, but a GGUF file; give that file: {found[0]}")
        if is_consolidated(path) and not any((path / name).is_file() for name in (WEIGHTS, INDEX)):
            return ConsolidatedCheckpoint(path)
        plain = SafetensorsCheckpoint(path)
        if plain.config.get("quantization_config") is None:
            return plain
        from galerne.export.checkpoint.quantized_folder import QuantizedCheckpoint

        return QuantizedCheckpoint(path)
    if path.suffix == ".gguf" and path.is_file():
        # The gguf package is wanted for GGUF only.
        from galerne.export.checkpoint.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    found_text = f"a {path.suffix or 'plain'} file" if path.exists() else "nothing"
    raise InputError(f"{path}: found {found_text}; expected a folder with config.json and safetensors, or a .gguf file")
