"""The second socket of a connection through shared memory: segments are passed over it. Private."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import Final

from gpuremote.errors import ConnectionLost, ProtocolError
from gpuremote.memory.shared import Loans, SegmentInfo

__all__ = ["Side"]

_SEGMENT: Final = struct.Struct("<IQI")


class Side:
    """This end of it.

    Parameters
    ----------
    sock : socket.socket
        AF_UNIX, SOCK_SEQPACKET, connected; its owner is this from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def close(self) -> None:
        self._sock.close()

    def send(self, info: SegmentInfo, fd: int) -> bool:
        """Pass a segment; False: the other end is slow to take them, or gone."""
        message = _SEGMENT.pack(info.ident, info.block, info.blocks)
        rights = array.array("i", [fd])
        try:
            self._sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except OSError:
            return False
        return True

    def take(self, loans: Loans) -> None:
        """Take in the segments that have come.

        Raises
        ------
        ConnectionLost
            This process can't open any more files.
        ProtocolError
            What came is no segment.
        """
        while True:
            try:
                message, fds, flags, _ = socket.recv_fds(self._sock, _SEGMENT.size, 1)
            except BlockingIOError:
                return
            if not message and not fds:
                return  # the other end is gone; what it had passed before is here
            try:
                if flags & socket.MSG_CTRUNC and not fds:
                    raise ConnectionLost("this process can't open any more files")
                if len(message) != _SEGMENT.size or len(fds) != 1:
                    raise ProtocolError("a malformed segment of shared memory")
                loans.add(SegmentInfo(*_SEGMENT.unpack(message)), fds[0])
            finally:
                for fd in fds:
                    os.close(fd)
