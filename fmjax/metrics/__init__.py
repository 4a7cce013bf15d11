"""Sample quality: how far generated samples are from real ones, each figure with its error.

Everything here runs on the host, in float64. `[N, D]` samples are the features of images under an
encoder, or vectors as they are. The encoders load Flax, so they are imported by their own names.
"""

from .estimate import Estimate as Estimate
from .estimate import jackknife as jackknife
from .frechet import Moments as Moments
from .frechet import frechet_distance as frechet_distance
from .frechet import frechet_estimate as frechet_estimate
from .frechet import merge as merge
from .frechet import moments as moments
from .kernel import Kernel as Kernel
from .kernel import energy_distance as energy_distance
from .kernel import gaussian_kernel as gaussian_kernel
from .kernel import kernel_distance as kernel_distance
from .kernel import polynomial_kernel as polynomial_kernel
from .kernel import squared_mmd as squared_mmd
from .scores import class_accuracy as class_accuracy
from .scores import inception_score as inception_score
from .transport import wasserstein1 as wasserstein1
from .transport import wasserstein2 as wasserstein2
