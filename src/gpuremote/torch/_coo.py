"""Arithmetic of sparse tensors (COO) of which indices and values are remote tensors.

torch's own kernels for it walk through the host's memory, or CUDA's. These are made of ops that the
server checks: an index that is too large is an error there, and not memory of someone else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import torch

__all__ = [
    "add",
    "add_",
    "add_out",
    "addmm",
    "addmm_",
    "addmm_out",
    "bmm",
    "bmm_out",
    "coalesce",
    "div",
    "div_",
    "div_out",
    "floor_divide",
    "floor_divide_",
    "floor_divide_out",
    "index_select",
    "mul",
    "mul_",
    "mul_out",
    "multiplied",
    "projected",
    "sparse_mask",
    "sub",
    "sub_",
    "sub_out",
    "sum_backward",
    "vector_norm",
]

aten: Final = torch.ops.aten
Tensor = torch.Tensor
Number: TypeAlias = bool | int | float | complex


def _flat(places: Tensor, lengths: Sequence[int]) -> Tensor:
    """Indices along axes of these lengths as one number each."""
    if not len(lengths):
        return torch.zeros(places.shape[1], dtype=torch.int64, device=places.device)
    found = places[0]
    for axis, length in enumerate(lengths[1:], 1):
        found = found * length + places[axis]
    return found


def _rows(self: Tensor) -> Tensor:
    """Where each element is, as one number: its place in the dense tensor's leading axes."""
    return _flat(self._indices(), self.shape[: self.sparse_dim()])


def _axes(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """The indices of what lies at these places."""
    if len(lengths) == 1:
        return rows.unsqueeze(0)
    found: list[Tensor] = []
    for length in reversed(lengths):
        found.append(rows.remainder(length))
        rows = rows.div(length, rounding_mode="floor")
    return torch.stack(found[::-1]) if found else rows.new_empty((0, len(rows)))


def _leading(self: Tensor) -> int:
    """How many places the sparse axes have."""
    return self.shape[: self.sparse_dim()].numel()


def _with(
    self: Tensor, indices: Tensor, values: Tensor, *, coalesced: bool | None, shape: Any = None
) -> Tensor:
    """Another tensor with the axes of ``self``. If it is coalesced is up to torch for None: where
    two elements are."""
    made: Tensor = aten._sparse_coo_tensor_with_dims_and_tensors(
        self.sparse_dim(),
        values.dim() - 1,
        self.shape if shape is None else shape,
        indices,
        values,
        dtype=values.dtype,
        layout=torch.sparse_coo,
        device=values.device,
        is_coalesced=coalesced,
    )
    return made


def _is_sparse(value: Tensor | Number) -> bool:
    """torch gives numbers to a kernel in Python as they are."""
    return isinstance(value, Tensor) and value.is_sparse


def _picked(dense: Tensor, mask: Tensor) -> Tensor:
    """Of a dense tensor the values at the places of a sparse one of the same shape."""
    count = mask.sparse_dim()
    flat = dense if count == 1 else dense.reshape(_leading(mask), *dense.shape[count:])
    return flat.index_select(0, _rows(mask))


def coalesce(self: Tensor) -> Tensor:
    if self.is_coalesced():
        return self
    if self._nnz() < 2:
        return self.clone()._coalesced_(True)
    # Each place once, and for each element which of them is its. How many differ only the server
    # knows: the one wait. (`unique` asks for the shapes of three results.)
    values = self._values()
    ordered, order = _rows(self).sort()
    new = torch.cat((torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]))
    which = torch.empty_like(order).scatter_(0, order, new.cumsum(0) - 1)
    places = ordered[new.nonzero()[:, 0]]
    sums = values.new_zeros((len(places), *values.shape[1:])).index_add_(0, which, values)
    indices = _axes(places, self.shape[: self.sparse_dim()])
    return _with(self, indices, sums, coalesced=True)


# -- sums -----------------------------------------------------------------------------------------


def _check_cast(dtype: torch.dtype, out: Tensor, op: str) -> None:
    if not torch.can_cast(dtype, out.dtype):
        raise RuntimeError(
            f"Can't convert result type {dtype} to output {out.dtype} in {op} operation"
        )


def _scaled_by(self: Tensor, other: Tensor, alpha: Number, *, given: bool = False) -> Number:
    """``alpha`` as torch checks it, in its words. With a tensor given for the result it takes for
    integers a float too, and cuts it off: here only one that is whole."""
    dtype = torch.promote_types(self.dtype, other.dtype)
    real = not dtype.is_complex
    if real and not dtype.is_floating_point and not isinstance(alpha, int):
        if given and isinstance(alpha, float) and alpha.is_integer():
            return int(alpha)
        raise RuntimeError(
            "For integral input tensors, argument alpha must not be a floating point number."
        )
    if real and isinstance(alpha, complex):
        raise RuntimeError(
            "For non-complex input tensors, argument alpha must not be a complex number."
        )
    if isinstance(alpha, bool) and dtype != torch.bool and not given:
        raise RuntimeError("Boolean alpha only supported for Boolean results.")
    return alpha


def _negative(self: Tensor, other: Tensor, alpha: Number) -> Number:
    """The number that a difference is a sum with."""
    if self.dtype == other.dtype == torch.bool:
        raise RuntimeError(
            "Subtraction, the `-` operator, with two bool tensors is not supported. Use the `^` or "
            "`logical_xor()` operator instead."
        )
    if torch.bool in (self.dtype, other.dtype):
        raise RuntimeError(
            "Subtraction, the `-` operator, with a bool tensor is not supported. If you are trying "
            "to invert a mask, use the `~` or `logical_not()` operator instead."
        )
    if isinstance(alpha, bool):
        raise RuntimeError("torch boolean negative, the `-` operator, is not supported.")
    return -alpha


def _add_into(dense: Tensor, other: Tensor, alpha: Number) -> None:
    """Add a sparse tensor to a dense one of its dtype or a wider one."""
    values = other._values().to(dense.dtype)
    if not other._nnz() or not other.numel():
        return
    count = other.sparse_dim()
    if not count:
        dense.add_(values.sum(0), alpha=alpha)
    elif count == 1:
        dense.index_add_(0, other._indices()[0], values, alpha=alpha)
    elif dense.is_contiguous():
        flat = dense.view(_leading(other), *dense.shape[count:])
        flat.index_add_(0, _rows(other), values, alpha=alpha)
    else:
        places = tuple(other._indices().unbind(0))
        dense.index_put_(places, values if alpha == 1 else values * alpha, accumulate=True)


def _added_to_dense(self: Tensor, other: Tensor, alpha: Number, out: Tensor) -> Tensor:
    if self.shape != other.shape:
        raise RuntimeError(
            "add: expected 'self' and 'other' to have same size, but self has size "
            f"{list(self.shape)} while other has size {list(other.shape)} (FYI: dense-sparse "
            "addition does not currently support broadcasting)"
        )
    dtype = torch.promote_types(self.dtype, other.dtype)
    _check_cast(dtype, out, "add")
    if out is not self:
        if out.shape != self.shape:
            out.resize_(self.shape)
        out.copy_(self)
    if out.dtype == dtype:
        _add_into(out, other, alpha)
    else:
        wide = self.to(dtype)
        _add_into(wide, other, alpha)
        out.copy_(wide)
    return out


def _added_to_sparse(self: Tensor, other: Tensor, alpha: Number) -> Tensor:
    """As on CUDA the elements of both, one after the other. So this waits for nothing, until there
    are more of them than places."""
    if not (_is_sparse(self) and _is_sparse(other)):
        raise RuntimeError("add(sparse, dense) is not supported. Use add(dense, sparse) instead.")
    if self.shape != other.shape:
        raise RuntimeError(
            "add: expected sizes of 'self' and 'other' to match, but "
            f"{list(self.shape)} != {list(other.shape)}"
        )
    dtype = torch.promote_types(self.dtype, other.dtype)
    if not other._nnz():
        return self.to(dtype, copy=True)
    more = other._values().to(dtype, copy=not self._nnz())
    if alpha != 1:
        more = (more * alpha).to(dtype)
    if not self._nnz():
        return _with(other, other._indices().clone(), more, coalesced=other.is_coalesced())
    if self.sparse_dim() != other.sparse_dim():
        raise RuntimeError(
            "add: expected 'self' and 'other' to have same density, but 'self' has "
            f"{self.sparse_dim()} sparse dimensions while 'other' has {other.sparse_dim()} sparse "
            "dimensions"
        )
    indices = torch.cat((self._indices(), other._indices()), 1)
    values = torch.cat((self._values().to(dtype), more))
    made = _with(self, indices, values, coalesced=False)
    return made if len(values) <= _leading(self) else coalesce(made)


def add(self: Tensor, other: Tensor, *, alpha: Number = 1) -> Tensor:
    alpha = _scaled_by(self, other, alpha)
    if self.is_sparse:
        return _added_to_sparse(self, other, alpha)
    dtype = torch.promote_types(self.dtype, other.dtype)
    return _added_to_dense(self, other, alpha, torch.empty_like(self, dtype=dtype))


def add_(self: Tensor, other: Tensor, *, alpha: Number = 1) -> Tensor:
    return add_out(self, other, alpha=alpha, out=self)


def add_out(self: Tensor, other: Tensor, *, alpha: Number = 1, out: Tensor) -> Tensor:
    alpha = _scaled_by(self, other, alpha, given=True)
    if not self.is_sparse:
        return _added_to_dense(self, other, alpha, out)
    made = _added_to_sparse(self, other, alpha)
    _check_cast(made.dtype, out, "add")
    return out.copy_(made)


def sub(self: Tensor, other: Tensor, *, alpha: Number = 1) -> Tensor:
    return add(self, other, alpha=_negative(self, other, alpha))


def sub_(self: Tensor, other: Tensor, *, alpha: Number = 1) -> Tensor:
    return add_out(self, other, alpha=_negative(self, other, alpha), out=self)


def sub_out(self: Tensor, other: Tensor, *, alpha: Number = 1, out: Tensor) -> Tensor:
    return add_out(self, other, alpha=_negative(self, other, alpha), out=out)


# -- products -------------------------------------------------------------------------------------


def mul(self: Any, other: Any) -> Tensor:
    if _is_sparse(self) and _is_sparse(other):
        return _intersected(self, other)
    one, dense = (self, other) if _is_sparse(self) else (other, self)
    values = one._values()
    if isinstance(dense, Tensor) and dense.dim():
        if torch.broadcast_shapes(one.shape, dense.shape) != one.shape:
            raise RuntimeError(
                f"mul: a dense tensor of {list(dense.shape)} can't be spread over a sparse one of "
                f"{list(one.shape)}"
            )
        dense = _picked(dense.expand(one.shape), one)
    made = values * dense
    return _with(one, one._indices().clone(), made, coalesced=one.is_coalesced())


def mul_(self: Tensor, other: Any) -> Tensor:
    return mul_out(self, other, out=self)


def mul_out(self: Tensor, other: Any, *, out: Tensor) -> Tensor:
    made = mul(self, other)
    _check_cast(made.dtype, out, "mul")
    return out.copy_(made if out.is_sparse else made.to_dense())


def div(self: Tensor, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    if not _is_sparse(self) or (isinstance(other, Tensor) and (other.is_sparse or other.dim())):
        raise RuntimeError(
            "Sparse division requires a scalar or zero-dim dense tensor divisor (got shape "
            f"{list(getattr(other, 'shape', ()))} for divisor)"
        )
    # What is rounded by itself is not what the sum would be.
    one = self if rounding_mode is None else self.coalesce()
    values = torch.div(one._values(), other, rounding_mode=rounding_mode)
    return _with(one, one._indices().clone(), values, coalesced=one.is_coalesced())


def div_(self: Tensor, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    return div_out(self, other, rounding_mode=rounding_mode, out=self)


def div_out(self: Tensor, other: Any, *, rounding_mode: str | None = None, out: Tensor) -> Tensor:
    made = div(self, other, rounding_mode=rounding_mode)
    _check_cast(made.dtype, out, "div")
    return out.copy_(made)


def floor_divide(self: Tensor, other: Any) -> Tensor:
    return div(self, other, rounding_mode="floor")


def floor_divide_(self: Tensor, other: Any) -> Tensor:
    return div_out(self, other, rounding_mode="floor", out=self)


def floor_divide_out(self: Tensor, other: Any, *, out: Tensor) -> Tensor:
    return div_out(self, other, rounding_mode="floor", out=out)


def _intersected(self: Tensor, other: Tensor) -> Tensor:
    """The product of two: where both have an element."""
    if self.shape != other.shape or self.sparse_dim() != other.sparse_dim():
        raise RuntimeError(
            "mul: expected 'self' and 'other' to have same sizes and sparse dimensions, but "
            f"{list(self.shape)} != {list(other.shape)}"
        )
    one, two = self.coalesce(), other.coalesce()
    if not one._nnz() or not two._nnz():
        dtype = torch.promote_types(one.dtype, two.dtype)
        return torch.zeros_like(one, dtype=dtype)
    where, met = _searched(_rows(two).contiguous(), _rows(one))
    kept = met.nonzero()[:, 0]
    values = one._values()[kept] * two._values()[where[kept]]
    return _with(one, one._indices()[:, kept], values, coalesced=True)


def _searched(ordered: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where in an ascending list each of these is first, and whether it is there."""
    if not len(ordered):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    where = torch.searchsorted(ordered, wanted).clamp_(max=len(ordered) - 1)
    return where, ordered[where] == wanted


def sparse_mask(self: Tensor, mask: Tensor) -> Tensor:
    """What ``self`` has at the places of ``mask``, summed; waits for nothing."""
    if self.shape != mask.shape:
        raise RuntimeError(
            "sparse_mask(): operands have incompatible sizes; self has size "
            f"{list(self.shape)} but mask has size {list(mask.shape)}"
        )
    if self is mask:
        return self
    if not self.is_sparse:
        values = _picked(self, mask)
    elif not mask._nnz():
        values = self._values()[:0].clone()
    else:
        # Summed where the mask has that place first; from there to where it has it again.
        asked = _rows(mask)
        ordered = asked.sort()[0]
        where, met = _searched(ordered, _rows(self))
        given = _kept(self._values(), met)
        sums = given.new_zeros((len(ordered), *given.shape[1:])).index_add_(0, where, given)
        values = sums.index_select(0, torch.searchsorted(ordered, asked))
    return _with(mask, mask._indices().clone(), values, coalesced=mask.is_coalesced())


def projected(self: Tensor, mask: Tensor, accumulate_matches: bool = False) -> Tensor:
    """``self`` with zeros where ``mask`` has no element; else as it is, or times the number."""
    ordered, rows = _rows(mask).sort()[0], _rows(self)
    times = torch.searchsorted(ordered, rows, right=True) - torch.searchsorted(ordered, rows)
    values = _kept(self._values(), times > 0)
    if accumulate_matches:
        values = values * _beside(times, values).to(values.dtype)
    return _with(self, self._indices().clone(), values, coalesced=self.is_coalesced())


def _beside(flags: Tensor, values: Tensor) -> Tensor:
    """One number for each element, in the shape that goes with their values."""
    return flags.view(-1, *(1,) * (values.dim() - 1))


def _kept(values: Tensor, flags: Tensor) -> Tensor:
    return values.masked_fill(~_beside(flags, values), 0)


def _meetings(ordered: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Each of these with each that equals it in an ascending list: where the two are. How many
    there are only the server knows: one wait."""
    first = torch.searchsorted(ordered, wanted)
    counts = torch.searchsorted(ordered, wanted, right=True) - first
    which = torch.repeat_interleave(counts)
    steps = torch.arange(len(which), device=which.device) - (counts.cumsum(0) - counts)[which]
    return which, first[which] + steps


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """Two sparse matrices: each element of one meets a row of the other."""
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({list(left.shape)} and "
            f"{list(right.shape)})"
        )
    one, two = left.coalesce(), right.coalesce()
    rows, columns = one._indices().unbind(0)
    starts, there = two._indices().unbind(0)
    which, met = _meetings(starts.contiguous(), columns)
    indices = torch.stack((rows[which], there[met]))
    values = one._values()[which] * two._values()[met]
    shape = (left.shape[0], right.shape[1])
    return coalesce(_with(left, indices, values, coalesced=False, shape=shape))


def _product(one: Tensor, two: Tensor) -> Tensor:
    """A sparse matrix times a dense one: each element adds a multiple of a row to a row."""
    if one.dim() != 2 or two.dim() != 2 or one.sparse_dim() != 2 or one.shape[1] != two.shape[0]:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({list(one.shape)} and {list(two.shape)})"
        )
    rows, columns = one._indices().unbind(0)
    parts = one._values().unsqueeze(1) * two.index_select(0, columns)
    return two.new_zeros((one.shape[0], two.shape[1])).index_add_(0, rows, parts)


def addmm(
    self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Number = 1, alpha: Number = 1
) -> Tensor:
    if mat1.is_sparse and not mat2.is_sparse and not self.is_sparse:
        found = _product(mat1, mat2)
    elif mat2.is_sparse and not mat1.is_sparse and not self.is_sparse:
        found = _product(mat2.t(), mat1.t()).t()
    else:
        raise NotImplementedError(
            "addmm of a sparse remote tensor takes one sparse matrix, and two that are dense"
        )
    if alpha != 1:
        found = found * alpha
    return found if beta == 0 else found + (self if beta == 1 else self * beta)


def addmm_(
    self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Number = 1, alpha: Number = 1
) -> Tensor:
    return self.copy_(addmm(self, mat1, mat2, beta=beta, alpha=alpha))


def addmm_out(
    self: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: Number = 1,
    alpha: Number = 1,
    out: Tensor,
) -> Tensor:
    made = addmm(self, mat1, mat2, beta=beta, alpha=alpha)
    if out.shape != made.shape:
        out.resize_(made.shape)
    return out.copy_(made)


def bmm(self: Tensor, mat2: Tensor) -> Tensor:
    if not self.is_sparse or mat2.is_sparse or self.sparse_dim() != 3 or mat2.dim() != 3:
        raise NotImplementedError("bmm of remote tensors takes a sparse one and a dense one")
    if self.shape[0] != mat2.shape[0] or self.shape[2] != mat2.shape[1]:
        raise RuntimeError(f"bmm: {list(self.shape)} and {list(mat2.shape)} can't be multiplied")
    count, height, depth = self.shape
    batch, rows, columns = self._indices().unbind(0)
    flat = mat2.reshape(count * depth, -1)
    parts = self._values().unsqueeze(1) * flat.index_select(0, batch * depth + columns)
    found = mat2.new_zeros((count * height, mat2.shape[2]))
    return found.index_add_(0, batch * height + rows, parts).view(count, height, -1)


def bmm_out(self: Tensor, mat2: Tensor, *, out: Tensor) -> Tensor:
    made = bmm(self, mat2)
    if out.shape != made.shape:
        out.resize_(made.shape)
    return out.copy_(made)


# -- the rest -------------------------------------------------------------------------------------


def vector_norm(
    self: Tensor,
    ord: Number = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Of all elements: what clipping gradients asks for. Places without one add nothing to it."""
    if dim is not None or keepdim or (isinstance(ord, complex) or ord < 0):
        raise NotImplementedError("the norm of a sparse remote tensor is one of all its elements")
    values = self.coalesce()._values()
    return (
        torch.linalg.vector_norm(values, ord, dtype=dtype)
        if values.numel()
        else (torch.zeros((), dtype=dtype or self.abs().dtype, device=self.device))
    )


def index_select(self: Tensor, dim: int, index: Tensor) -> Tensor:
    axes, count = self.dim(), self.sparse_dim()
    if not axes:
        raise IndexError("index_select() cannot be applied to a 0-dim tensor.")
    if not -axes <= dim < axes:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-axes}, {axes - 1}], but got "
            f"{dim})"
        )
    if index.dim() != 1 or index.layout != torch.strided or index.dtype != torch.int64:
        raise IndexError(
            "index_select() argument index must be 1-D strided (non-sparse) long-tensor."
        )
    dim %= axes
    shape = list(self.shape)
    length, shape[dim] = shape[dim], len(index)
    if dim >= count:
        values = self._values().index_select(dim - count + 1, index)
        indices, coalesced = self._indices().clone(), self.is_coalesced()
        return _with(self, indices, values, coalesced=coalesced, shape=shape)
    wrapped = index + (index < 0) * length
    # Only the server sees one beyond the axis: it picks the second of one there.
    beyond = (wrapped < 0) | (wrapped >= length)
    zeros = index.new_zeros(1).index_select(0, beyond.long())
    ordered, order = self._indices()[dim].sort(stable=True)
    which, met = _meetings(ordered, wrapped + zeros)
    element = order[met]
    indices = self._indices().index_select(1, element)
    indices[dim] = which
    values = self._values().index_select(0, element)
    return _with(self, indices, values, coalesced=None, shape=shape)


def sum_backward(grad: Tensor, self: Tensor, dim: Sequence[int]) -> Tensor:
    """Of a sum over axes: for each element what was given to the place that it went to."""
    axes = {axis % self.dim() for axis in dim}
    one = self.coalesce()
    count, values = one.sparse_dim(), one._values()
    kept = [axis for axis in range(count) if axis not in axes]
    if not kept:
        given = grad.unsqueeze(0)
    else:
        lengths = [self.shape[axis] for axis in kept]
        wanted = _flat(one._indices()[kept], lengths)
        if grad.is_sparse:
            there = grad.coalesce()
            where, met = _searched(_rows(there).contiguous(), wanted)
            given = there._values()
            if there._nnz():
                given = _kept(given.index_select(0, where), met)
            else:
                given = given.new_zeros((len(wanted), *given.shape[1:]))
        else:
            flat = grad.reshape(torch.Size(lengths).numel(), *grad.shape[len(kept) :])
            given = flat.index_select(0, wanted)
    for axis in sorted(axes):
        if axis >= count:
            given = given.unsqueeze(axis - count + 1)
    indices = one._indices().clone()
    return _with(one, indices, given.expand_as(values).clone(), coalesced=True)
