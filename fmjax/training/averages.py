"""Running averages that look further back the longer a run is.

With weights that follow a power of the step, the average of a run of N steps is that of its last
part, and the part is the same share of every run:

    average after N steps = sum_k w_k p_k,   w_k = (k / N)^(gamma + 1) - ((k - 1) / N)^(gamma + 1)

which is the density (gamma + 1) tau^gamma of tau = k / N on [0, 1], and is reached by the decay

    d_n = (n / (n + 1))^(gamma + 1)

of the step that is the (n + 1)-th. The warm-up of a constant decay, (1 + n) / (10 + n), is
asymptotically that of gamma = 8.
"""

import jax.numpy as jnp
import numpy as np
import optax

from ..types import check_number

_NARROWEST = 1e-6
_WIDEST = 12**-0.5  # of gamma = 0, the mean over all steps


def power_ema(std: float) -> optax.Schedule:
    """The decay `n -> d_n` of an average whose width is a share of the run, for `ema_decay`.

    gamma is the root of std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Args:
      std: the standard deviation of the weights over the run's steps, as a share of their number,
        in [1e-6, 0.2886]. EDM2's best are about 0.05 to 0.15; the widest is the mean of all steps.

    Returns:
      A schedule of decays in [0, 1). In float32 a decay rounds to 6e-8, and what it leaves for the
      new parameters to n 6e-8 / (gamma + 1) of itself: less than 1 % in a million steps.

    Raises:
      ValueError: if `std` is no number in [1e-6, 0.2886].

    Example:
      >>> decay = power_ema(0.0905)
      >>> round(float(decay(999)), 4)  # 1 - 9 / 1000
      0.991

    Source: Karras et al. 2024, arXiv 2312.02696, section 3.1.
    """
    check_number("std", std, "The usual value is 0.1", positive=True)
    if not _NARROWEST <= std <= _WIDEST:
        raise ValueError(
            f"std must be in [{_NARROWEST}, 0.2886], whose end is the mean over all steps; got "
            f"{std}. The usual value is 0.1."
        )
    # (g + 2)^2 (g + 3) = (g + 1) / std^2, whose largest root is that of the narrower profile.
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    power = float(roots.real.max()) + 1

    def decay(step):
        return jnp.exp(-power * jnp.log1p(1 / jnp.maximum(step, 1e-30)))

    return decay
