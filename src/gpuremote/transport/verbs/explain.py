"""What went wrong with verbs, for people: a name, what it means, and what to do."""

from __future__ import annotations

import errno
from typing import Final

from gpuremote.transport.verbs.base import Status

__all__ = ["explain_errno", "explain_status"]

_STATUS: Final = {
    Status.RETRY_EXC_ERR: (
        "the peer's card did not answer",
        "is the link up (`rdma link`), and does the network carry RoCE between the two?",
    ),
    Status.RNR_RETRY_EXC_ERR: (
        "the peer had no receive posted",
        "that breaks this transport's credits: please report it",
    ),
    Status.WR_FLUSH_ERR: (
        "the queue pair had failed already",
        "the peer may have closed or lost the connection",
    ),
    Status.REM_ACCESS_ERR: (
        "the peer refused the access to its memory",
        "please report it if the peer runs this library",
    ),
    Status.REM_INV_REQ_ERR: (
        "the peer refused the request as invalid",
        "please report it if the peer runs this library",
    ),
    Status.REM_OP_ERR: ("the peer could not complete it", "look at the peer's kernel log"),
    Status.LOC_PROT_ERR: (
        "this side's memory is not registered for it",
        "was the memory unmapped while it was lent?",
    ),
    Status.LOC_QP_OP_ERR: (
        "this side's card could not carry it out",
        "is the link up (`rdma link`)?",
    ),
    Status.LOC_LEN_ERR: ("a message is larger than its buffer", "please report it"),
    Status.FATAL_ERR: ("the card failed", "look at the kernel log (`dmesg`)"),
}


def explain_status(status: int) -> str:
    """``NAME: what it means; what to do``."""
    try:
        known = Status(status)
    except ValueError:
        return f"work completion status {status}"
    meaning, step = _STATUS.get(known, ("", "look at the kernel log (`dmesg`)"))
    return f"{known.name}: {meaning + '; ' if meaning else ''}{step}"


def explain_errno(error: OSError) -> str:
    """The text of an error of a verb, with what to do where that is known."""
    text = str(error.args[-1]) if error.args else type(error).__name__
    if error.errno == errno.ENOMEM:
        return (
            f"{text}: memory that may be locked is too small; raise it "
            "(`ulimit -l unlimited`, LimitMEMLOCK=infinity, docker --ulimit memlock=-1)"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"{text}: not permitted; may this user open /dev/infiniband/uverbs*?"
    return text
