"""One config.json for each preset of `galerne synth`, as the original checkpoint has it."""
