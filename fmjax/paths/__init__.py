"""Affine conditional paths from noise (t = 0) to data (t = 1), and what follows from them.

A path is two functions of time, alpha and sigma:

    x_t = alpha(t) x1 + sigma(t) x0,      u_t = d/dt x_t = alpha'(t) x1 + sigma'(t) x0,

with alpha(0) = 0 or nearly so, alpha(1) = 1, sigma(0) = 1 or nearly so, sigma(1) = 0 or sigma_min.
The derivatives are never written down: `jax.jvp` takes them. Bridges, which begin at any
distribution, have a third function gamma, the weight of noise on the way (`bridges`).
"""

from .affine import AffinePath as AffinePath
from .affine import sample_path as sample_path
from .ancestral import ancestral_diffusion as ancestral_diffusion
from .ancestral import ancestral_drift as ancestral_drift
from .bridge_drifts import bridge_drift as bridge_drift
from .bridge_drifts import bridge_flow as bridge_flow
from .bridge_drifts import bridge_score as bridge_score
from .bridges import BridgeFields as BridgeFields
from .bridges import BridgePath as BridgePath
from .bridges import BridgeSample as BridgeSample
from .bridges import bridge_loss as bridge_loss
from .bridges import brownian_bridge as brownian_bridge
from .bridges import sample_bridge as sample_bridge
from .change import change_path as change_path
from .change import match_scales as match_scales
from .change import match_times as match_times
from .conversions import score_to_velocity as score_to_velocity
from .conversions import velocity_to_score as velocity_to_score
from .conversions import velocity_to_x0 as velocity_to_x0
from .conversions import velocity_to_x1 as velocity_to_x1
from .conversions import x0_to_velocity as x0_to_velocity
from .conversions import x1_to_velocity as x1_to_velocity
from .langevin import langevin_diffusion as langevin_diffusion
from .langevin import langevin_drift as langevin_drift
from .marginal import marginal_velocity as marginal_velocity
from .predictions import PredictedVelocity as PredictedVelocity
from .predictions import from_x0 as from_x0
from .predictions import from_x1 as from_x1
from .predictions import precondition as precondition
from .schedules import cond_ot as cond_ot
from .schedules import cosine as cosine
from .schedules import linear_vp as linear_vp
from .schedules import polynomial as polynomial
from .schedules import vp as vp
