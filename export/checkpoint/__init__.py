"""Where weights come from: safetensors folders and GGUF files."""
