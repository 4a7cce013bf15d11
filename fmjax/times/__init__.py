"""Densities of training times on [0, 1]."""

from .densities import edm_skewed as edm_skewed
from .densities import logit_normal as logit_normal
from .densities import shifted as shifted
from .densities import uniform as uniform
