"""RDMA over verbs: payload is written by the card into the receiver's final memory.

It is brought up over the first, authenticated connection, which stays open beside it and says when
the peer is gone. Needs a verbs library (``pyverbs``, which comes with rdma-core) and a card, or
software RoCE.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Final

from gpuremote.errors import GpuRemoteError, TransportUnavailable
from gpuremote.transport.base import TransportStats
from gpuremote.transport.rdma.connection import RdmaConnection
from gpuremote.transport.rdma.control import Control
from gpuremote.transport.rdma.setup import Options, RdmaPath, bring_up, look
from gpuremote.transport.setup import Setup
from gpuremote.transport.verbs.base import VerbsError, VerbsProvider
from gpuremote.transport.verbs.explain import explain_errno
from gpuremote.transport.verbs.gids import text_of
from gpuremote.transport.verbs.pyverbs_provider import PyverbsProvider

__all__ = ["Options", "Rdma", "RdmaConnection", "default_provider"]

_CLASS: Final = Path("/sys/class/infiniband")
_NODES: Final = Path("/dev/infiniband")


@functools.cache
def default_provider() -> VerbsProvider:
    """The verbs library of this machine.

    Raises
    ------
    TransportUnavailable
        There is no device, or no library for it.
    """
    if not _CLASS.is_dir() or not any(_CLASS.iterdir()):
        raise TransportUnavailable("no RDMA device on this machine")
    nodes = sorted(_NODES.glob("uverbs*"))
    if not nodes:
        raise TransportUnavailable(
            f"no RDMA device node in {_NODES}; load ib_uverbs, or pass the nodes to the container"
        )
    if not any(os.access(node, os.R_OK | os.W_OK) for node in nodes):
        raise TransportUnavailable(
            f"not permitted to open {nodes[0]}; may this user? (its group is often `rdma`)"
        )
    try:
        return PyverbsProvider()
    except ImportError as error:
        raise TransportUnavailable(
            f"pyverbs can't be imported ({error}); install python3-pyverbs of this system and use "
            "its Python (or one of the same version)"
        ) from None


class Rdma:
    """The transport; see ``setup.Upgrade``.

    Attributes
    ----------
    options : Options
        Of every connection that is brought up from here on.
    provider : callable
        Gives the verbs library, or raises TransportUnavailable.
    """

    options: ClassVar[Options] = Options()
    provider: ClassVar[Callable[[], VerbsProvider]] = staticmethod(default_provider)

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        """Whether it works on this side, as far as one can tell alone. Never raises."""
        try:
            return True, _try(cls.provider(), cls.options)
        except GpuRemoteError as error:
            return False, error.message
        except VerbsError as error:
            return False, explain_errno(error)
        except Exception as error:
            return False, f"{type(error).__name__}: {error}"

    @classmethod
    def connect(cls, setup: Setup) -> RdmaPath:
        return bring_up(setup, cls.provider(), cls.options, client=True)

    @classmethod
    def accept(cls, setup: Setup) -> RdmaPath:
        return bring_up(setup, cls.provider(), cls.options, client=False)


def _try(provider: VerbsProvider, options: Options) -> str:
    """Make what a connection needs, and give it back; what was found."""
    rails = look(provider, options)
    try:
        found = []
        for rail in rails:
            control = Control(rail, rail.queue_pair(*Control.depths()), TransportStats())
            control.close()
            found.append(
                f"{rail.device.name} port {rail.port.number}, {rail.gid.kind.value} as "
                f"{text_of(rail.gid.raw)}, MTU {rail.port.mtu}"
            )
    finally:
        for rail in rails:
            rail.close()
    return f"{'; '.join(found)} ({provider.name})"
