"""What pages are of: model, pool, form and rank. Whatever differs there is another namespace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from kvstore.errors import BadInput
from kvstore.keys import MAX_NAME, Fingerprint, Namespace, name_bytes

FORMAT = "sglang-pages/1"
DIGEST_BYTES = 32
HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Place:
    """Of one process of a deployment: its rank and the size, of each way in which SGLang splits a model."""

    tp: tuple[int, int]
    pp: tuple[int, int]
    cp: tuple[int, int]
    dcp: tuple[int, int]
    page: int | None  # tokens that one page of all ``dcp`` ranks stands for
    replicated: bool  # all ``tp`` ranks have the same keys and values (MLA)

    @classmethod
    def of(cls, config: Any) -> Place:
        """From SGLang's ``HiCacheStorageConfig``."""
        kinds = ("tp", "pp", "attn_cp", "dcp")
        tp, pp, cp, dcp = ((getattr(config, f"{kind}_rank"), getattr(config, f"{kind}_size")) for kind in kinds)
        return cls(tp, pp, cp, dcp, config.logical_page_size, bool(config.is_mla_model))

    @property
    def processes(self) -> int:
        """How many processes it is one of, at least."""
        return max(self.tp[1], self.cp[1]) * self.pp[1]

    def shard(self, pool: str) -> dict[str, str]:
        """Which part of a page's keys and values this rank has. State of Mamba layers is never replicated."""
        split = not self.replicated or pool == "mamba"
        named = {"pp": self.pp, "cp": self.cp} | ({"tp": self.tp} if split else {})
        words = {name: f"{rank}/{size}" for name, (rank, size) in named.items()}
        if self.dcp[1] > 1:
            words["dcp"] = f"{self.dcp[0]}/{self.dcp[1]} of {self.tp[1]}, {self.page} tokens"
        return words


def namespace(model: str, pool: str, place: Place, form: Mapping[str, str], tag: str, tenant: str) -> Namespace:
    """The namespace of a pool's pages. ``form``: dtype, layout and shape, by name."""
    words = {"format": FORMAT, "model": model, "pool": pool, "tag": tag}
    words |= {f"rank.{name}": value for name, value in place.shard(pool).items()}
    words |= {f"form.{name}": value for name, value in form.items()}
    for name, value in words.items():
        name_bytes(value, name)
    return Namespace(Fingerprint(words), tenant)


def owner(model: str) -> str:
    """Whose the pages of a model are, for ``forget``."""
    name = f"sglang:{model}"
    if len(name_bytes(name, "model_name")) <= MAX_NAME:
        return name
    return f"sglang:{blake2b(name.encode(), digest_size=DIGEST_BYTES).hexdigest()}"


def digest(key: object) -> bytes:
    """32 bytes for a page's key: SHA-256 in hex is taken as it is, anything else is hashed. Raises ``BadInput``."""
    if not isinstance(key, str):
        raise BadInput(f"a page's key is a text, not a {type(key).__name__}")
    if len(key) == 2 * DIGEST_BYTES and HEX.issuperset(key):
        return bytes.fromhex(key)
    return blake2b(name_bytes(key, "key"), digest_size=DIGEST_BYTES, person=b"sglang-page-key").digest()
