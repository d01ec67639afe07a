"""Micro benchmarks: each figure as a ratio to a limit of the machine that is measured in the same run."""
