"""One config.json for each preset of `galerne synth`: the original checkpoint's sizes."""
