"""The Inception score, from a classifier's logits.

    IS = exp(mean_i KL(p(y | x_i) || p(y))),    p(y) = mean_i p(y | x_i),

between 1 (every sample gets the same prediction) and the number of classes (sure predictions,
all classes alike). It never looks at real data.

Source: Salimans et al. 2016, arXiv 1606.03498 (section 4).
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from .estimate import Estimate, as_samples, group_slices


def inception_score(logits: ArrayLike, *, num_splits: int = 10) -> Estimate:
    """The Inception score by the field's convention: the mean of the scores of equal splits.

    Each split has a marginal p(y) of its own, so the score grows with the size of a split: compare
    figures of equal N and `num_splits` only. All is computed from log-probabilities, so that no
    probability underflows in a logarithm.

    Args:
      logits: before the softmax, `[N, classes]`, independent and in random order (samples sorted
        by class lower the score).
      num_splits: number of splits of consecutive samples.

    Returns:
      `Estimate(value, standard_error)`: the mean over the splits, and their standard deviation
      (of ddof 1) over sqrt(num_splits). Publications often print the deviation itself.

    Raises:
      ValueError: if `logits` isn't `[N, classes]`, holds a NaN or an infinity, `num_splits < 2` or
        N < `num_splits`.

    Example:
      >>> round(inception_score(np.tile(1e3 * np.eye(4), (10, 1)), num_splits=5).value, 9)
      4.0

    Source: arXiv 1606.03498, section 4, ten splits.
    """
    logits = as_samples("logits", logits)
    splits = [logits[group] for group in group_slices(len(logits), num_splits)]
    scores = np.array([_score(split.astype(np.float64)) for split in splits])
    return Estimate(float(scores.mean()), float(scores.std(ddof=1) / np.sqrt(num_splits)))


def _score(logits: np.ndarray) -> float:
    log_p = special.log_softmax(logits, axis=1)
    log_marginal = special.logsumexp(log_p, axis=0) - np.log(len(log_p))
    kl = np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1)
    return float(np.exp(kl.mean()))
