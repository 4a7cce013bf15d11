"""From a trained flow to statements about data: units, densities and weights."""

from .standardizer import Standardizer as Standardizer
from .standardizer import fit_standardizer as fit_standardizer
from .standardizer import log_det as log_det
from .standardizer import standardize as standardize
from .standardizer import unstandardize as unstandardize
