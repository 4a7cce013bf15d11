"""The order of examples: batches of indices, a function of (seed, step) alone.

Nothing about them needs saving: an interrupted run sees the batches that it would have seen.
"""

from collections.abc import Iterator

import numpy as np


def batches(
    num_examples: int, batch_size: int, *, seed: int, start_step: int = 0
) -> Iterator[np.ndarray]:
    """Batches of indices without end, every index exactly once in every epoch.

    The permutations of epochs 0, 1, 2, ..., each a function of (seed, epoch) alone, are laid end
    to end and cut into batches. Where `batch_size` does not divide `num_examples`, a batch holds
    the tail of one epoch and the head of the next, and nothing is dropped.

    Args:
      num_examples: N.
      batch_size: from 1 to N.
      seed: not negative.
      start_step: where to begin. The batches are those an uninterrupted run would see from that
        step on; this takes O(N) time, whatever the step.

    Returns:
      An iterator of int64 arrays `[batch_size]` of indices below N.

    Raises:
      ValueError: at the call, for arguments outside these bounds.

    Example:
      >>> next(batches(5, 2, seed=0)).shape
      (2,)
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must be from 1 to the number of examples, {num_examples}; got "
            f"{batch_size}. Take a smaller batch or a larger split."
        )
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step can't be negative; got {seed} and {start_step}.")
    return _batches(num_examples, batch_size, seed, start_step)


def _batches(num_examples: int, batch_size: int, seed: int, step: int) -> Iterator[np.ndarray]:
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(num_examples)

    epoch, start = divmod(step * batch_size, num_examples)
    order = permutation(epoch)
    while True:
        head, start = order[start : start + batch_size], start + batch_size
        if start > num_examples:
            epoch, start = epoch + 1, start - num_examples
            order = permutation(epoch)
            yield np.concatenate([head, order[:start]])
        else:
            yield head.copy()  # the caller's own: a view would let it write into the epoch
