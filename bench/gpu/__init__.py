"""Correctness and speed on a CUDA machine: one command, one table, one file of figures."""
