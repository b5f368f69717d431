"""Tensors of the host among the arguments of an op on remote ones."""

from __future__ import annotations

from typing import Any, Final

import torch

__all__ = ["bring_over"]

INDEXED: Final = frozenset(
    (
        "aten::index.Tensor",
        "aten::index_put",
        "aten::index_put_",
        "aten::_index_put_impl_",
        "aten::_unsafe_index.Tensor",
        "aten::_unsafe_index_put",
        "aten::_unsafe_masked_index",
    )
)
"""Ops that take indices from the host, as on any device of torch's."""


def bring_over(name: str, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments, with tensors of the host uploaded where torch allows them.

    Raises
    ------
    RuntimeError
        It does not, in torch's own words.
    """
    places = [t.device for t in _tensors((args, keywords))]
    remote = next((place for place in places if place.type == "remote"), torch.device("remote", 0))

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type != "remote":
            return value.to(remote)
        if isinstance(value, (list, tuple)):
            return type(value)([one(item) for item in value])
        return value

    elsewhere = [place for place in places if place.type == "remote" and place != remote]
    if name in INDEXED and not elsewhere:
        return (args[0], one(args[1]), *args[2:]), {k: one(v) for k, v in keywords.items()}
    other = next(place for place in places if place != remote)
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{remote} and {other}! (when checking arguments of {name})"
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
