"""Graph passes, quantization recipes, lowerings for a target, and engine builders."""
