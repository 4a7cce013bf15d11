"""Scores from a classifier's logits: the Inception score, and the accuracy of classes asked for.

    IS = exp(mean_i KL(p(y | x_i) || p(y))),    p(y) = mean_i p(y | x_i),

between 1 (every sample gets the same prediction) and the number of classes (sure predictions,
all classes alike). With c_i = 1 where the largest logit of sample i is that of its label y_i,

    accuracy = mean_i c_i,    standard error = sqrt(accuracy (1 - accuracy) / N).

Neither looks at real data.

Source: Salimans et al. 2016, arXiv 1606.03498 (section 4); Shmelkov et al. 2018, arXiv 1807.09499
("GAN-test", the accuracy of a classifier of real images on conditional samples).
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


def class_accuracy(logits: ArrayLike, labels: ArrayLike) -> Estimate:
    """The share of samples whose largest logit is that of the class asked for.

    Of conditional samples it says how often a classifier sees in them what they were drawn for
    ("GAN-test"). Of labelled real images it is the classifier's own accuracy: read the former
    against it.

    Args:
      logits: `[N, classes]`, or probabilities. Where several are the largest, the first counts.
      labels: `[N]`, whole numbers from 0 to classes - 1.

    Returns:
      `Estimate(value, standard_error)`, a share between 0 and 1 and its binomial standard error,
      which is 0 where all samples agree.

    Raises:
      ValueError: if `logits` isn't `[N, classes]` or not finite, or `labels` are not N whole
        numbers below the number of classes.

    Example:
      >>> class_accuracy([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]], [0, 1, 1, 1])
      Estimate(value=0.5, standard_error=0.25)

    Source: arXiv 1807.09499, GAN-test; the module's formula.
    """
    logits, labels = as_samples("logits", logits), np.asarray(labels)
    num, num_classes = logits.shape
    if labels.shape != (num,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be whole numbers [{num}], one for each row of logits; got "
            f"{labels.dtype} {list(labels.shape)}. Of one-hot rows take labels.argmax(axis=1)."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be 0 to {num_classes - 1}, the columns of logits; got {labels.min()} to "
            f"{labels.max()}. Samples that were drawn without a class have no accuracy."
        )
    accuracy = float(np.mean(np.argmax(logits, axis=1) == labels))
    return Estimate(accuracy, float(np.sqrt(accuracy * (1 - accuracy) / num)))


def _score(logits: np.ndarray) -> float:
    log_p = special.log_softmax(logits, axis=1)
    log_marginal = special.logsumexp(log_p, axis=0) - np.log(len(log_p))
    kl = np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1)
    return float(np.exp(kl.mean()))
