"""Who is at the other end of a connection."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_PEER = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel says. ``place``: where on another machine; then nothing else is known."""

    uid: int
    pid: int
    place: str = ""

    def __str__(self) -> str:
        return self.place or f"process {self.pid} of user {self.uid}"


def peer_of(sock: socket.socket) -> Peer:
    """Who has connected, as the kernel says."""
    pid, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return Peer(uid, pid)
