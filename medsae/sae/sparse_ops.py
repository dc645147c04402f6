"""The active set: which entries of the [B, m] code carry values and gradients, and the products over it.

Every architecture's code is zero almost everywhere, and so is the gradient of its loss. An architecture picks the active set from pre-activations that
need no gradient, then works on `values`, one number a pair (sample, neuron). Two representations give the same numbers: `Sparse` (compressed rows; all
products cost B * L0 * d) and `Dense` (matrices; where much is active, as in the first steps of the ReLU architectures, in small problems, and for the ReLU architectures on a GPU).
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

DENSE_SHARE = 0.04
"""Share of active pairs above which dense products are faster (measured on a CPU)."""
SMALL = 2**24
"""Multiplications of a dense product of all pairs up to which it costs less than the bookkeeping of a sparse one (measured on a CPU)."""
BLOCK = 16
"""Neurons of which the largest pre-activation stands for all, where the k largest are looked for."""

with warnings.catch_warnings():
    # PyTorch says once a process that compressed sparse rows are in beta; nobody who runs a stage can act on it.
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1.0]), size=(1, 1), check_invariants=False)


class Active(Protocol):
    """A set of (sample, neuron) pairs of a [B, m] code. `values` are one number a pair."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor:
        """Values of (x - shift) W^T + bias, differentiable in weight [m, d], bias [m] and shift [d]; x [B, d] is data."""

    def spread(self, parameter: Tensor) -> Tensor:
        """A parameter [m] as something that multiplies or adds to values."""

    def total(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """Sum of all values, each times its neuron's weight, where weights [m] are given."""

    def decode(self, values: Tensor, weight: Tensor) -> Tensor:
        """Sum over a sample's neurons of value * weight[neuron], [B, d]; weight [m, d]."""

    def fired(self, values: Tensor) -> Tensor:
        """Whether each neuron has a value above 0 in any sample, bool [m]."""

    def prefixes(self, values: Tensor, weight: Tensor, ends: tuple[int, ...]) -> Tensor:
        """What the first ends[0], ends[1], ... neurons decode to (nested prefixes; the last end is m), [G, B, d]."""


def preactivations(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """(x - shift) W^T + bias, [B, m], without gradient, the product taken in `dtype`; written to `out` [B, m] where given (but for other dtypes than x's),
    which may be the transpose of a contiguous matrix.
    """
    with torch.no_grad():
        centred = x if shift is None else x - shift
        if dtype != torch.float32:
            product = (centred.to(dtype) @ weight.to(dtype).T).float()
            return product if bias is None else product.add_(bias)
        if out is not None and out.T.is_contiguous():
            out = out.T
            return (torch.mm(weight, centred.T, out=out) if bias is None else torch.addmm(bias.unsqueeze(1), weight, centred.T, out=out)).T
        return torch.mm(centred, weight.T, out=out) if bias is None else torch.addmm(bias, centred, weight.T, out=out)


def columns(pre: Tensor, index: Tensor) -> Tensor:
    """Some columns of a matrix, contiguous. Where they lie by column, rows of the transpose are taken: sixty times faster."""
    return pre.T.index_select(0, index).T.contiguous() if pre.T.is_contiguous() else pre.index_select(1, index)


class _GivenLinear(torch.autograd.Function):
    """(x - shift) W^T + bias whose result is known already; only the gradients are computed."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, shift)
        ctx.biased = bias is not None
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shift = ctx.saved_tensors
        grad = grads[0]
        columns = grad.sum(dim=0)
        centred = x if shift is None else x - shift
        return None, None, grad.T @ centred, columns if ctx.biased else None, None if shift is None else -(columns @ weight)


class Dense:
    """All pairs: values are [B, m] matrices. `given` are pre-activations that are known already."""

    def __init__(self, given: Tensor) -> None:
        self.given = given

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor:
        out: Tensor = _GivenLinear.apply(self.given, x, weight, bias, shift)
        return out

    def spread(self, parameter: Tensor) -> Tensor:
        return parameter

    def total(self, values: Tensor, weights: Tensor | None) -> Tensor:
        return values.sum() if weights is None else values.sum(dim=0) @ weights

    def decode(self, values: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = _DenseDecode.apply(values, weight)
        return out

    def fired(self, values: Tensor) -> Tensor:
        if not len(values):
            return torch.zeros(values.shape[1], dtype=torch.bool, device=values.device)
        return values.detach().amax(dim=0) > 0

    def prefixes(self, values: Tensor, weight: Tensor, ends: tuple[int, ...]) -> Tensor:
        out: Tensor = _DensePrefixes.apply(values, weight, ends)
        return out


def _like(values: Tensor) -> Tensor:
    """An uninitialised matrix that lies in memory as `values` does: elementwise operations on two layouts are many times slower."""
    return torch.empty_like(values.T).T if values.T.is_contiguous() else torch.empty_like(values)


class _DenseDecode(torch.autograd.Function):
    """values @ weight; the gradient lies in memory as the values do."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight)
        return values @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        inner = torch.mm(grads[0], weight.T, out=_like(values)) if ctx.needs_input_grad[0] else None
        return inner, values.T @ grads[0] if ctx.needs_input_grad[1] else None


class _DensePrefixes(torch.autograd.Function):
    """Running sums over groups of neurons; gradients are running sums from the last."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, ends: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.groups = list(zip((0, *ends[:-1]), ends, strict=True))
        return torch.stack([values[:, start:end] @ weight[start:end] for start, end in ctx.groups]).cumsum(dim=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        inner, dense = _like(values), torch.empty_like(weight)
        running = torch.zeros_like(grads[0][0])
        for index in reversed(range(len(ctx.groups))):
            start, end = ctx.groups[index]
            running += grads[0][index]
            torch.mm(running, weight[start:end].T, out=inner[:, start:end])
            torch.mm(values[:, start:end].T, running, out=dense[start:end])
        return inner, dense, None


def weighted_sums(rows: Tensor, offsets: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """A sparse matrix in compressed rows (offsets [r + 1], columns and values [nnz]) times dense `rows` [c, d]: [r, d].

    An embedding bag: on a CPU it is several times faster than PyTorch's product of a sparse matrix, which clears and copies its result first.
    """
    return torch.embedding_bag(rows, columns, offsets, mode=0, per_sample_weights=values, include_last_offset=True)[0]


class Sparse:
    """Some pairs, by sample (compressed sparse rows).

    `rows` int64 [B + 1] offsets, `columns` int64 [nnz] neurons, `given` float32 [nnz] pre-activations that are known already, `neurons` m.
    """

    def __init__(self, rows: Tensor, columns: Tensor, given: Tensor, neurons: int) -> None:
        self.rows, self.columns, self.given, self.neurons = rows, columns, given, neurons
        self._by_neuron: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def samples(self) -> int:
        return len(self.rows) - 1

    def matrix(self, values: Tensor) -> Tensor:
        """The code as a sparse [B, m] matrix."""
        return torch.sparse_csr_tensor(self.rows, self.columns, values, size=(self.samples, self.neurons), check_invariants=False)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """left[i] . right[j] of the pairs (i, j), [nnz]; left [B, d], right [m, d]."""
        pattern = self.matrix(torch.zeros_like(self.given))
        return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0, out=pattern).values()

    def sums(self, values: Tensor, weight: Tensor) -> Tensor:
        """The code times a dense matrix [m, d]: [B, d]."""
        return weighted_sums(weight, self.rows, self.columns, values)

    def sums_by_neuron(self, values: Tensor, x: Tensor) -> Tensor:
        """The transposed code times a dense matrix [B, d]: [m, d]."""
        if self._by_neuron is None:
            columns, order = self.columns.sort(stable=True)
            # Where each neuron's pairs begin. Counting them would make a GPU's host wait.
            offsets = torch.searchsorted(columns, torch.arange(self.neurons + 1, device=columns.device))
            samples = torch.repeat_interleave(torch.arange(self.samples, device=self.rows.device), self.rows.diff(), output_size=len(self.columns))
            self._by_neuron = offsets, samples[order], order
        offsets, samples, order = self._by_neuron
        return weighted_sums(x, offsets, samples, values[order])

    def at_least(self, threshold: float) -> Sparse:
        """The pairs whose pre-activation reaches a threshold."""
        kept = self.given >= threshold
        before = torch.zeros(len(kept) + 1, dtype=torch.int64, device=kept.device)
        torch.cumsum(kept, 0, out=before[1:])
        return Sparse(before[self.rows], self.columns[kept], self.given[kept], self.neurons)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor:
        out: Tensor = _SparseLinear.apply(self, x, weight, bias, shift)
        return out

    def spread(self, parameter: Tensor) -> Tensor:
        return parameter.index_select(0, self.columns)

    def total(self, values: Tensor, weights: Tensor | None) -> Tensor:
        return (values if weights is None else values * self.spread(weights)).sum()

    def decode(self, values: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = _SparseDecode.apply(self, values, weight)
        return out

    def fired(self, values: Tensor) -> Tensor:
        counts = torch.zeros(self.neurons, dtype=torch.int32, device=values.device)
        return counts.index_add_(0, self.columns, (values.detach() > 0).to(torch.int32)) > 0

    def prefixes(self, values: Tensor, weight: Tensor, ends: tuple[int, ...]) -> Tensor:
        out: Tensor = _GroupedDecode.apply(self, values, weight, ends)
        return out


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Sparse, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor:
        ctx.active, ctx.biased = active, bias is not None
        ctx.save_for_backward(x, weight, shift)
        return active.given.view_as(active.given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shift = ctx.saved_tensors
        active: Sparse = ctx.active
        columns = torch.zeros(active.neurons, dtype=grads[0].dtype, device=x.device).index_add_(0, active.columns, grads[0])
        centred = x if shift is None else x - shift
        product = active.sums_by_neuron(grads[0], centred)
        return None, None, product, columns if ctx.biased else None, None if shift is None else -(columns @ weight)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Sparse, values: Tensor, weight: Tensor) -> Tensor:
        ctx.active = active
        ctx.save_for_backward(values, weight)
        return active.sums(values, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        active: Sparse = ctx.active
        grad = grads[0].contiguous()
        inner = active.products(grad, weight) if ctx.needs_input_grad[1] else None
        return None, inner, active.sums_by_neuron(values, grad) if ctx.needs_input_grad[2] else None


def is_dense(samples: int, neurons: int, dim: int, active: float) -> bool:
    """Whether products over all pairs cost less than those over `active` neurons a sample, at width `dim`."""
    return samples * neurons * dim <= SMALL or active > DENSE_SHARE * neurons


def above(pre: Tensor, threshold: Tensor | float, dim: int) -> Sparse | Dense:
    """Pairs with pre-activation above a threshold (a number, or one a neuron); dense (all pairs) where they are many or the problem of width `dim` is
    small, and on a GPU, whose host need not wait then.
    """
    if pre.device.type != "cpu" or is_dense(len(pre), pre.shape[1], dim, 0):
        return Dense(pre)
    mask = pre > threshold
    return Dense(pre) if is_dense(len(pre), pre.shape[1], dim, int(torch.count_nonzero(mask)) / len(pre)) else _pairs(mask, pre)


def sparse_above(pre: Tensor, threshold: Tensor | float) -> Sparse:
    """Pairs with pre-activation above a threshold, however many."""
    return _pairs(pre > threshold, pre)


def _pairs(mask: Tensor, pre: Tensor) -> Sparse:
    """Pairs where mask [B, m] is set."""
    samples, neurons = pre.shape
    if not mask.T.is_contiguous():
        flat = set_places(mask.reshape(-1))
        starts = torch.searchsorted(flat, torch.arange(0, (samples + 1) * neurons, neurons, device=flat.device))
        return Sparse(starts, flat % neurons, pre.reshape(-1)[flat], neurons)
    flat = set_places(mask.T.reshape(-1))
    rows, order = (flat % samples).to(torch.int32).sort(stable=True)
    flat = flat[order]
    starts = torch.searchsorted(rows, torch.arange(samples + 1, dtype=torch.int32, device=rows.device))
    return Sparse(starts, flat // samples, pre.T.reshape(-1)[flat], neurons)


def set_places(mask: Tensor) -> Tensor:
    """Where a mask [n] is set, int64 ascending. Few are, so words of eight are looked at first on a CPU."""
    if mask.device.type != "cpu" or len(mask) % 8:
        return mask.nonzero().squeeze(1)
    words = mask.view(torch.int64).nonzero().squeeze(1)
    word, byte = mask.view(-1, 8)[words].nonzero(as_tuple=True)
    return words[word] * 8 + byte


def row_topk(pre: Tensor, k: int, dim: int) -> Sparse | Dense:
    """The k largest pre-activations of each sample; dense, with zeros for the others (a ReLU must follow, which passes them no gradient), where the problem of width `dim` is small or k is much of it."""
    dense = is_dense(len(pre), pre.shape[1], dim, k)
    if not dense and pre.device.type == "cpu":
        found = _topk_by_blocks(pre, k)
        if found is not None:
            return found
    pre = pre.contiguous()
    values, columns = pre.topk(k, dim=1, sorted=False)
    if dense:
        return Dense(torch.zeros_like(pre).scatter_(1, columns, values))
    rows = torch.arange(0, pre.shape[0] * k + 1, k, device=pre.device)
    return Sparse(rows, columns.reshape(-1), values.reshape(-1), pre.shape[1])


def _topk_by_blocks(pre: Tensor, k: int) -> Sparse | None:
    """Exact top-k of pre-activations that lie by neuron; None where blocks do not help (few neurons for k, many equal values, NaN).

    Neurons are cut into blocks of BLOCK. At least k of a sample's values reach the k-th largest of its block maxima, so its k largest do too; they are
    looked for only in the blocks whose maximum reaches it, which are k but for ties.
    """
    samples, neurons = pre.shape
    blocks = neurons // BLOCK
    if neurons % BLOCK or blocks < 2 * k or not pre.T.is_contiguous():
        return None
    cut = pre.T.view(BLOCK, blocks, samples)
    maxima = cut.amax(dim=0)
    bound = maxima.T.contiguous().topk(k, dim=1, sorted=False).values.amin(dim=1)
    where = set_places((maxima >= bound).view(-1))
    if len(where) > 8 * k * samples:
        return None
    values = cut.view(BLOCK, -1).index_select(1, where)
    sample = where % samples
    place, pick = (values >= bound[sample]).nonzero(as_tuple=True)
    row, order = sample[pick].to(torch.int32).sort(stable=True)
    starts = torch.searchsorted(row, torch.arange(samples + 1, dtype=torch.int32))
    counts = starts.diff()
    if int(counts.min()) < k or int(counts.max()) > 4 * BLOCK * k:
        return None
    place, pick = place[order], pick[order]
    padded = torch.full((samples, int(counts.max())), -torch.inf, dtype=pre.dtype)
    column = torch.arange(len(row)) - starts[:-1].repeat_interleave(counts)
    padded[row.long(), column] = values[place, pick]
    top = padded.topk(k, dim=1, sorted=False)
    chosen = (starts[:-1, None] + top.indices).view(-1)
    rows = torch.arange(0, samples * k + 1, k)
    return Sparse(rows, place[chosen] * blocks + where[pick[chosen]] // samples, top.values.view(-1), neurons)


class _GroupedDecode(torch.autograd.Function):
    """Each pair is decoded once, in the group that it belongs to; prefixes are running sums over groups, gradients running sums from the last."""

    @staticmethod
    def forward(ctx: Any, active: Sparse, values: Tensor, weight: Tensor, ends: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(values, weight)
        samples = torch.repeat_interleave(torch.arange(active.samples, device=values.device), active.rows.diff(), output_size=len(active.columns))
        ctx.parts = []
        prefixes = weight.new_empty(len(ends), active.samples, weight.shape[1])
        for index, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
            chosen = ((active.columns >= start) & (active.columns < end)).nonzero().squeeze(1)
            rows = torch.zeros_like(active.rows)
            torch.cumsum(torch.bincount(samples[chosen], minlength=active.samples), 0, out=rows[1:])
            part = Sparse(rows, active.columns[chosen] - start, values[chosen], end - start)
            ctx.parts.append((start, end, chosen, part))
            product = part.sums(part.given, weight[start:end])
            torch.add(product, prefixes[index - 1], out=prefixes[index]) if index else prefixes[index].copy_(product)
        return prefixes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        inner, dense = torch.empty_like(values), torch.empty_like(weight)
        running = torch.zeros_like(grads[0][0])
        for index in reversed(range(len(ctx.parts))):
            start, end, chosen, part = ctx.parts[index]
            running += grads[0][index]
            inner[chosen] = part.products(running, weight[start:end])
            dense[start:end] = part.sums_by_neuron(part.given, running)
        return None, inner, dense, None
