"""Centroids that outlive the batch: an extension of the paper, for many classes a small batch.

The memory is one tensor ``[C, D]``, float32. A row of zeros is a class not seen. Rows are made unit
when they are read, so that averages of memories are memories too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.centroids import Classes, Table, unit
from varcon_loss.readable import values_may_be_read

PREDICT_ROWS = 4096  # logits of this many rows are held at a time


def update(memory: Tensor, classes: Classes, momentum: float) -> None:
    """Move centroids towards the batch's means, in place: ``w <- unit(m w + (1 - m) mean)``.

    A class seen first takes its mean. A class whose sum is zero, or not finite, keeps what it had.
    A class that has less than one sample in all moves by so much less: smoothing gives each class a
    little of every sample, which says little about it.
    """
    if not values_may_be_read(memory):
        classes = classes.of_all(memory.shape[0])
    names = classes.names
    if names is None and torch.compiler.is_compiling():
        # Inductor's C++ for CPUs fails on a plain copy into the memory.
        names = torch.arange(memory.shape[0], device=memory.device)
    before = memory if names is None else memory.index_select(0, names)
    means, lengths = unit(classes.sums.to(memory.dtype), memory.dtype)
    old = unit(before, memory.dtype)[0]
    step = classes.counts.clamp(max=1).to(memory.dtype).mul(1 - momentum)
    new, new_lengths = unit(old.lerp(means, step.unsqueeze(1)), memory.dtype)
    # The length of a zero row is infinite, that of a broken one NaN.
    moved = (lengths < torch.inf) & (new_lengths < torch.inf) & (classes.counts > 0)
    new = torch.where(moved.unsqueeze(1), new, before)
    if names is None:
        memory.copy_(new)
    else:
        memory.index_copy_(0, names, new)


def table_of_memory(memory: Tensor, dtype: torch.dtype) -> Table:
    """Every class seen so far; where values may not be read, every class."""
    present = torch.linalg.vector_norm(memory, dim=1) != 0
    names = None
    if values_may_be_read(present):
        names = present.nonzero().squeeze(1)
        if names.shape[0] == present.shape[0]:
            names = present = None
        elif names.shape[0] == 0:
            names, present = names.new_zeros(1), present[:1]
        else:
            present = None
    rows = memory if names is None else memory.index_select(0, names)
    return Table(unit(rows, memory.dtype)[0].to(dtype), present, names)


class Prediction(NamedTuple):
    """Nearest-centroid classification."""

    label: Tensor  # int64; -1 for NaN features or an empty memory
    confidence: Tensor  # p(label | z), Eq. 8; NaN for the same


def predict(z: Tensor, memory: Tensor, temperature: float) -> Prediction:
    """The most probable class of each row ``[N, D]`` over the classes seen."""
    w, present, names = table_of_memory(memory, z.dtype)
    keys = w.T / temperature
    parts = []
    for part in z.split(PREDICT_ROWS):
        logits = part @ keys
        if present is not None:
            logits.masked_fill_(~present, -torch.inf)
        parts.append(logits.log_softmax(1).max(1))
    label = torch.cat([part.indices for part in parts])
    confidence = torch.cat([part.values for part in parts]).exp()
    if names is not None:
        label = names.index_select(0, label)
    return Prediction(label.masked_fill(confidence.isnan(), -1), confidence)
