"""Adapters: one module per engine; importing this package loads no engine."""
