"""What ``kvstore serve`` can be told: one schema, read from a file, the environment and flags, in this order.

>>> from kvstore.settings import load
>>> settings = load(None, {"dir": "cache", "host": "2GiB"}, {"KVSTORE_DRAIN": "1m"})
>>> settings.host, settings.drain, str(settings.socket_path)
(2147483648, 60.0, 'cache/kvstore.sock')

Needs pydantic, which ``import kvstore`` and ``kvstore.open`` do without.
"""

from kvstore.settings.address import Address
from kvstore.settings.loading import load
from kvstore.settings.rows import Row, as_toml, explain, json_schema
from kvstore.settings.schema import Budget, Encryption, Redis, Settings, Tcp, Tenant
from kvstore.settings.secret import read_secret

__all__ = [
    "load",
    "Settings",
    # its parts
    "Address",
    "Budget",
    "Encryption",
    "Redis",
    "Tcp",
    "Tenant",
    # for people
    "as_toml",
    "explain",
    "json_schema",
    "Row",
    # what it names
    "read_secret",
]
