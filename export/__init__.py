"""From a checkpoint to the portable graph, and the proof that it matches its source."""
