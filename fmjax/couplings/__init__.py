"""Couplings: who is paired with whom, from the source (t = 0) to the data (t = 1)."""

from .exact import independent as independent
from .exact import minibatch_ot as minibatch_ot
