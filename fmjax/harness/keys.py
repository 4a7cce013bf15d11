"""What random keys are for: each purpose has its own, made from a seed and its number here.

    key = fold_in(jax.random.key(seed), number of the purpose)

A number stays with its purpose: another would change what is drawn.
"""

import jax

PURPOSES = {
    "parameters": 0,
    "training": 1,  # step n folds n in, once
    "finish": 2,  # samples and likelihoods at the end of a run
    "preview": 3,
    "held out": 4,  # noise and times of the held-out loss
    "samples": 5,  # of an evaluation; batch i folds i in
    "likelihood": 6,  # of an evaluation: dequantisation and probes
    "curve": 7,  # the noise that all solvers share
    "drawn": 8,  # of the command that draws; sample k folds k in
    "pairs": 9,  # the noise of a teacher's pairs; pair k folds k in
    "jumps": 10,  # noise on the way of sample k, which folds k in
}


def key(seed: int, purpose: str) -> jax.Array:
    """The key of a purpose under a seed.

    Example:
      >>> key(0, "samples").shape
      ()
    """
    return jax.random.fold_in(jax.random.key(seed), PURPOSES[purpose])
