"""A batch of any size on one device, exactly: chunks whose losses add up to the batch's.

Centroids are constants of a step, and class sums add up over chunks. So a batch that does not fit
takes two passes. The first adds up the sums, without a gradient. The second evaluates each chunk
against the finished centroids. Between them only ``[K, D]`` sums are kept.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import get_device_states, set_device_states

from varcon_loss import checks
from varcon_loss import loss as flow
from varcon_loss.centroids import Classes, Table, widest
from varcon_loss.module import VarConLoss
from varcon_loss.ranks import group_of, merge, over_ranks, room_of, size_of
from varcon_loss.readable import without_autocast


class LargeBatch:
    """One batch, given in chunks: its loss and gradient as if it had been given at once.

    Each chunk is embedded twice: without a gradient for `add`, and with one for the call, whose
    losses add up to the loss of the whole batch. Embeddings must be the same both times: replay
    dropout's random states, as `backward_in_chunks` does. A centroid memory moves once, and ranks
    exchange once, at the first call, whatever the number of chunks.

    Args:
        criterion: in training mode, with reduction ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: the criterion has reduction ``"none"``.
        RuntimeError: the criterion is in eval mode; chunks come in another order than all of
            `add` before all calls; or more rows are evaluated than were added.

    Example:
        >>> import torch
        >>> from varcon_loss import LargeBatch, VarConLoss
        >>> encoder, images = torch.nn.Linear(8, 4), torch.randn(12, 8)
        >>> labels = torch.arange(12) % 3
        >>> big = LargeBatch(VarConLoss())
        >>> with torch.no_grad():
        ...     for x, y in zip(images.split(5), labels.split(5)):
        ...         big.add(encoder(x), y)
        >>> for x, y in zip(images.split(5), labels.split(5)):
        ...     big(encoder(x), y).backward()
    """

    def __init__(self, criterion: VarConLoss) -> None:
        if criterion.reduction == "none":
            got = "a criterion with reduction='none': use 'mean' or 'sum', and terms() for losses"
            raise ValueError(f"LargeBatch adds up losses of chunks, got {got} of each sample")
        self._criterion = criterion
        self._classes: Any = None  # of all chunks so far; then of all ranks
        self._total: Any = 0
        self._table: Any = None
        self._num_added = self._num_evaluated = 0

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a chunk to the class sums: ``features`` and ``labels`` as `VarConLoss` takes them.

        A rank without samples adds an empty chunk.
        """
        if self._table is not None:
            do = "Add all chunks first, and make a new LargeBatch for the next batch"
            late = "a chunk was added after the first part of the loss"
            raise RuntimeError(f"{late}: one LargeBatch is one batch. {do}")
        chunk, options, impl = self._read(features, labels)
        with without_autocast(features.device.type):
            classes, _ = flow.add_up(chunk, options, impl)
            total, wide = flow.count(chunk, options.weight, chunk), widest(features.device)
            classes = Classes(classes.sums.to(wide), classes.counts.to(wide), classes.names)
            if self._classes is not None:
                classes = _joined(self._classes, classes, options.num_classes)
        self._classes, self._total = classes, total + self._total
        self._num_added += chunk[1].shape[0]
        # Autocast keeps weights that it has cast; those of this pass have no gradient.
        torch.clear_autocast_cache()

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        """The chunk's part of the loss of the whole batch, a scalar."""
        return flow.loss_of(features, self._evaluate(features, labels, need_terms=False))

    def terms(self, features: Tensor, labels: Tensor) -> flow.VarConTerms:
        """As the call, with the terms of the chunk's samples; its part is ``.reduced``."""
        return flow.terms_of(features, self._evaluate(features, labels, need_terms=True))

    def _read(self, features: Tensor, labels: Tensor) -> tuple[flow.Embedded, flow.Options, str]:
        if not self._criterion.training:
            do = "call train(), or evaluate by the criterion itself"
            raise RuntimeError(f"LargeBatch trains, but the criterion is in eval mode: {do}")
        options, memory = self._criterion._options(learns=True), self._criterion.centroid_memory
        options, dtype = flow.check_call(features, labels, None, None, options, memory)
        with without_autocast(features.device.type):
            impl = flow.choose(options.impl, features, labels, dtype)
            return flow.read(features, labels, options, dtype), options, impl

    def _evaluate(self, features: Tensor, labels: Tensor, *, need_terms: bool) -> flow.Scored:
        if self._classes is None:
            do = "give every chunk of the batch to add(), under torch.no_grad(), before the call"
            raise RuntimeError(f"no chunk was added: {do}")
        chunk, options, impl = self._read(features, labels)
        group, memory = group_of(options.process_group), self._criterion.centroid_memory
        with without_autocast(features.device.type):
            if self._table is None:
                self._finish(chunk, options, group, memory)
            self._num_evaluated += chunk[1].shape[0]
            if self._num_evaluated > self._num_added:
                rows = f"{self._num_evaluated} rows were evaluated but {self._num_added} added"
                raise RuntimeError(f"{rows}: give each chunk to add() once, and to the call once")
            table: Any = self._table
            added = Table(self._classes.sums, self._classes.counts > 0, self._classes.names)
            chunk = flow.with_classes(chunk, added, "the chunks that were added lack")
            if memory is not None:
                chunk = flow.known_to_memory(chunk, table)
            given = (chunk, table, self._classes, None, self._total, options, impl)
            return flow.score(*given, size_of(group), need_terms=need_terms)

    @torch.no_grad()
    def _finish(
        self, chunk: flow.Embedded, options: flow.Options, group: Any, memory: Tensor | None
    ) -> None:
        """After the last chunk: what ranks add, what a memory learns, and the centroids."""
        _, z, _, labels = chunk
        sums, counts, names = self._classes
        self._classes = Classes(sums.to(z.dtype), counts, names)
        if group is not None:
            same = flow.alike(options, memory, z, reference=False)
            room = room_of(group, self._criterion._exchanges, self._num_added, labels, same)
            given = (group, room, self._classes, self._total, options.num_classes)
            self._classes, self._total = over_ranks(*given)
        self._table = flow.table_for(self._classes, memory, options, z.dtype)


def _joined(a: Classes, b: Classes, num_classes: int | None) -> Classes:
    if a.names is None and b.names is None:
        return Classes(a.sums + b.sums, a.counts + b.counts, None)
    every = torch.arange(max(len(a.sums), len(b.sums)), device=a.sums.device)
    names = torch.cat([every if x.names is None else x.names for x in (a, b)])
    return merge(torch.cat((a.sums, b.sums)), torch.cat((a.counts, b.counts)), names, num_classes)


def backward_in_chunks(
    model: Callable[..., Tensor], criterion: VarConLoss, inputs: Any, labels: Tensor,
    chunk_size: int, backward: Callable[[Tensor], object] | None = None,
) -> Tensor:  # fmt: skip
    """The loss of the whole batch and its gradient, by chunks: forward twice, backward once.

    Random states are replayed, so dropout is the same in both passes. BatchNorm normalises each
    chunk by itself, and its running statistics move once per chunk. Augment before the call.
    Under DistributedDataParallel gradients are exchanged with the last chunk only.

    Args:
        model: gives embeddings ``[n, D]`` or ``[n, V, ...]``; in whatever mode it is to train.
        criterion: see `LargeBatch`.
        inputs: a tensor ``[B, ...]``, or a tuple or dictionary of them, for ``model``.
        labels: ``[B]`` or ``[B, C]``.
        chunk_size: the number of samples at a time, at least 1.
        backward: called with each part of the loss instead of its ``backward()``, as by a
            GradScaler: ``lambda part: scaler.scale(part).backward()``.

    Returns:
        The loss of the whole batch, detached.

    Example:
        >>> import torch
        >>> from varcon_loss import VarConLoss, backward_in_chunks
        >>> encoder, images = torch.nn.Linear(8, 4), torch.randn(12, 8)
        >>> loss = backward_in_chunks(
        ...     encoder, VarConLoss(), images, torch.arange(12) % 3, chunk_size=5
        ... )
    """
    if checks.whole_number("chunk_size", chunk_size, "an int") < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    lengths = {len(x) for x in (labels, *tree_leaves(inputs)) if isinstance(x, Tensor)}
    if len(lengths) != 1:
        got = f"got {sorted(lengths)}"
        raise ValueError(f"inputs and labels must have one length, the number of samples, {got}")
    starts = range(0, max(1, len(labels)), chunk_size)
    module = model if isinstance(model, nn.Module) else nn.Module()
    tensors = [x for x in (*tree_leaves(inputs), *module.parameters()) if isinstance(x, Tensor)]
    big, states = LargeBatch(criterion), []
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.no_grad(), _unsynchronised(model, True):
        for start in starts:
            states.append((torch.get_rng_state(), get_device_states(*tensors)))
            x, y = _part((inputs, labels), start, chunk_size)
            big.add(_embed(model, x), y)
        for buffer, before in kept:
            buffer.copy_(before)
    loss = torch.zeros((), device=labels.device)
    for start, (state, (devices, device_states)) in zip(starts, states, strict=True):
        torch.set_rng_state(state)
        set_device_states(devices, device_states)
        with _unsynchronised(model, start != starts[-1]):
            x, y = _part((inputs, labels), start, chunk_size)
            part = big(_embed(model, x), y)
            (backward or Tensor.backward)(part)
        loss = loss + part.detach()
    return loss


def _part(tensors: Any, start: int, size: int) -> Any:
    return tree_map(lambda x: x[start : start + size] if isinstance(x, Tensor) else x, tensors)


def _embed(model: Callable[..., Tensor], inputs: Any) -> Tensor:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _unsynchronised(model: Any, on: bool) -> contextlib.AbstractContextManager[object]:
    """Gradients stay on each rank: DDP and FSDP have ``no_sync``, FSDP2 a switch."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not on)
    return model.no_sync() if on and hasattr(model, "no_sync") else contextlib.nullcontext()
