"""Couplings: who is paired with whom, from the source (t = 0) to the data (t = 1)."""

from .conditional import conditional_ot as conditional_ot
from .exact import independent as independent
from .exact import minibatch_ot as minibatch_ot
from .plans import coupling_entropy as coupling_entropy
from .plans import entropic_plan as entropic_plan
from .pool import pair_pool as pair_pool
from .semidiscrete import Assignment as Assignment
from .semidiscrete import semidiscrete as semidiscrete
from .semidiscrete import semidiscrete_potential as semidiscrete_potential
from .sinkhorn import sinkhorn as sinkhorn
from .unbalanced import unbalanced as unbalanced
