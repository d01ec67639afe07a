"""kvstore: a hierarchical KV-cache store for LLM inference.

>>> import kvstore
>>> with kvstore.open(host="64MiB") as store:
...     store.stats()["tiers"]["host"]["blocks"]
0
"""

from kvstore.config import open
from kvstore.daemon import aconnect, connect
from kvstore.erasure import Receipt
from kvstore.errors import BadInput, ForkError, KVStoreError, StoreBusy, StoreClosed, Unreachable, Unsupported
from kvstore.job import Answer, Job
from kvstore.keeper import Demoted, Pinned, Retained
from kvstore.keys import Extra, Fingerprint, Namespace
from kvstore.layout import LayerShape, Layout, Shard
from kvstore.store import Store

__version__ = "0.1.0"

__all__ = [
    # the store
    "open",
    "connect",
    "aconnect",
    "Store",
    # what identifies bytes
    "Extra",
    "Fingerprint",
    "LayerShape",
    "Layout",
    "Namespace",
    "Shard",
    # a scheduler's hints
    "Answer",
    "Job",
    # what the store's verbs answer
    "Demoted",
    "Pinned",
    "Receipt",
    "Retained",
    # errors
    "BadInput",
    "ForkError",
    "KVStoreError",
    "StoreBusy",
    "StoreClosed",
    "Unreachable",
    "Unsupported",
]
