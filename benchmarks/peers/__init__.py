"""The peers: what a user would otherwise pick, each as its own documentation advises.

An adapter only builds calls; whether they are right is checked by whoever times them.
"""

from . import attention, binned, keops, nufft, own, statistics, textbook, trees, xla
from .own import OWN
from .peer import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer
    for module in (own, textbook, attention, keops, xla, nufft, binned, trees, statistics)
    for peer in module.PEERS
}

__all__ = ["OWN", "PEERS", "Peer"]
