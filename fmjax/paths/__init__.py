"""Conditional paths from the source (t = 0) to the data (t = 1), and conversions along them."""

from .schedules import AffinePath as AffinePath
from .schedules import cond_ot as cond_ot
from .schedules import cosine as cosine
from .schedules import linear_vp as linear_vp
from .schedules import marginal_velocity as marginal_velocity
from .schedules import polynomial as polynomial
from .schedules import sample_path as sample_path
from .schedules import score_to_velocity as score_to_velocity
from .schedules import velocity_to_score as velocity_to_score
from .schedules import velocity_to_x0 as velocity_to_x0
from .schedules import velocity_to_x1 as velocity_to_x1
from .schedules import vp as vp
from .schedules import x0_to_velocity as x0_to_velocity
from .schedules import x1_to_velocity as x1_to_velocity
