"""Time to the first token behind a real vLLM: without a cache, with its own, with the store's, and with a peer's."""
