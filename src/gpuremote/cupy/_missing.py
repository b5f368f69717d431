"""What CuPy has and this namespace has not, and why."""

from __future__ import annotations

from typing import Final

__all__ = ["missing"]

_ADDRESSES: Final = "where arrays lie in memory is known on the device alone"
_OLD: Final = "NumPy has dropped it"

_REASONS: Final[dict[str, str]] = {
    "byte_bounds": _ADDRESSES,
    "disable_experimental_feature_warning": "there is no such warning",
    "flatiter": "index the flattened array, ravel()",
    "format_parser": "there are no structured dtypes",
    "get_array_wrap": _OLD,
    "isfortran": _ADDRESSES,
    "issubclass_": _OLD,
    "make_aligned_dtype": "there are no structured dtypes",
    "may_share_memory": _ADDRESSES,
    "poly1d": "use polyval, roots and their like on the coefficients",
    "safe_eval": _OLD,
    "set_string_function": _OLD,
    "shares_memory": _ADDRESSES,
    "show_config": "see `gpuremote doctor`",
    "who": _OLD,
}


def missing() -> dict[str, str]:
    """Names of CuPy's that are not offered, each with the reason."""
    return dict(_REASONS)
