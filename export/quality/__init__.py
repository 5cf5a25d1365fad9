"""What quantization costs: a bundle against its source on text, in perplexity and KL divergence."""
