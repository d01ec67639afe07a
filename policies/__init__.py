"""Policies: pure Python, no input or output; each implements the port in `kvstore.policy`."""
