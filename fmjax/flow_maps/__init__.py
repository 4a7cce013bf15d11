"""What a trained velocity is distilled into: pairs of ends, learned solvers, an adversary's losses.

Time runs from the source at t = 0 to the data at t = 1; phi(t, s, x) is where the flow's path
that is at x at time t is at time s.
"""

from .adversary import RelativisticLosses as RelativisticLosses
from .adversary import gradient_penalty as gradient_penalty
from .adversary import relativistic_losses as relativistic_losses
from .adversary import transport_cost as transport_cost
from .fitting import FittedSolver as FittedSolver
from .fitting import fit_solver as fit_solver
from .pairs import flow_pairs as flow_pairs
from .pairs import invert_pairs as invert_pairs
from .pairs import straightness as straightness
from .solvers import NonStationary as NonStationary
from .solvers import apply_solver as apply_solver
from .solvers import check_solver as check_solver
from .solvers import from_euler as from_euler
from .solvers import from_midpoint as from_midpoint
