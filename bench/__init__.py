"""Benchmarks: replay of chat logs through a model, micro benchmarks, reports."""
