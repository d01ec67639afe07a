"""Simulation of caches on request traces: which policy keeps what comes back, and what that does to waiting times."""
