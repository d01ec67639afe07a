"""What a cache of constant size costs in perplexity, memory and time."""
