"""What moves between the store's bytes and an engine's tensors: rotation, kernels, streams."""
