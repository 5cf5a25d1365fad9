"""Presets: the `config.json` of models of known shapes, written after the originals'."""

import importlib.resources
import json
from typing import Any

from galerne.errors import InputError

_FOLDER = importlib.resources.files("galerne.export.presets")


def presets() -> list[str]:
    """Return the presets' names."""
    return sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))


def preset_config(preset: str, layers: int | None = None) -> dict[str, Any]:
    """Return a preset's `config.json`, with its first `layers` layers only where that is given.

    Raises: InputError if there is no such preset, or it has fewer layers.
    """
    if preset not in presets():
        raise InputError(f"preset {preset!r}: unknown; there are {', '.join(presets())}")
    config: dict[str, Any] = json.loads((_FOLDER / f"{preset}.json").read_bytes())
    if layers is not None:
        if not 1 <= layers <= config["num_hidden_layers"]:
            raise InputError(f"--layers: expected 1 to {config['num_hidden_layers']} for {preset}, found {layers}")
        config["num_hidden_layers"] = layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
    return config
