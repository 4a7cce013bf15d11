"""Densities of training times on [0, 1], and what is made of them."""

from .changes import shifted as shifted
from .changes import stratified as stratified
from .densities import beta as beta
from .densities import edm_skewed as edm_skewed
from .densities import logit_normal as logit_normal
from .densities import power as power
from .densities import u_shaped as u_shaped
from .densities import uniform as uniform
from .samplers import QuantileSampler as QuantileSampler
