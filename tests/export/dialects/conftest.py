"""The shared random Mistral as a checkpoint, which parity compares its bundles with."""

from pathlib import Path

import pytest

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.open import open_checkpoint


@pytest.fixture(scope="session")
def mistral(checkpoint_folder: Path) -> Checkpoint:
    """The shared random Mistral: 2 layers, window 16, 4/2 heads of 32."""
    return open_checkpoint(checkpoint_folder)
