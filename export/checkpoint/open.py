"""Opens a checkpoint by what is found at a path."""

from pathlib import Path

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.consolidated import ConsolidatedCheckpoint, is_consolidated
from galerne.export.checkpoint.lora import AdaptedCheckpoint
from galerne.export.checkpoint.quantized_folder import QuantizedCheckpoint
from galerne.export.checkpoint.safetensors_folder import CONFIG, INDEX, WEIGHTS, SafetensorsCheckpoint
from galerne.files import read_table


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
        if not (path / CONFIG).is_file() and (found := sorted(path.glob("*.gguf"))):
            raise InputError(f"{path}: no {CONFIG} in it, but a GGUF file; give that file: {found[0]}")
        if is_consolidated(path) and not any((path / name).is_file() for name in (WEIGHTS, INDEX)):
            return ConsolidatedCheckpoint(path)
        if (path / CONFIG).is_file() and read_table(path / CONFIG).get("quantization_config") is not None:
            return QuantizedCheckpoint(path)
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf" and path.is_file():
        # The gguf package is wanted for GGUF only.
        from galerne.export.checkpoint.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    found_text = f"a {path.suffix or 'plain'} file" if path.exists() else "nothing"
    raise InputError(f"{path}: found {found_text}; expected a folder with config.json and safetensors, or a .gguf file")
