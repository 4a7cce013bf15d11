"""fmjax: flow matching in JAX as pure functions. Time runs from noise (t = 0) to data (t = 1)."""

from .couplings import independent as independent
from .couplings import minibatch_ot as minibatch_ot
from .guidance import autoguidance as autoguidance
from .guidance import batched_guidance as batched_guidance
from .guidance import classifier_free_guidance as classifier_free_guidance
from .guidance import drop_labels as drop_labels
from .guidance import guidance_interval as guidance_interval
from .losses import cfm_loss as cfm_loss
from .paths import AffinePath as AffinePath
from .paths import cond_ot as cond_ot
from .paths import cosine as cosine
from .paths import linear_vp as linear_vp
from .paths import marginal_velocity as marginal_velocity
from .paths import polynomial as polynomial
from .paths import sample_path as sample_path
from .paths import score_to_velocity as score_to_velocity
from .paths import velocity_to_score as velocity_to_score
from .paths import velocity_to_x0 as velocity_to_x0
from .paths import velocity_to_x1 as velocity_to_x1
from .paths import vp as vp
from .paths import x0_to_velocity as x0_to_velocity
from .paths import x1_to_velocity as x1_to_velocity
from .solve import LogProb as LogProb
from .solve import Trajectory as Trajectory
from .solve import bits_per_dim as bits_per_dim
from .solve import exact_divergence as exact_divergence
from .solve import hutchinson_divergence as hutchinson_divergence
from .solve import hutchinson_estimates as hutchinson_estimates
from .solve import integrate as integrate
from .solve import integrate_log_prob as integrate_log_prob
from .solve import log_prob as log_prob
from .solve import sample as sample
from .solve import sample_and_log_prob as sample_and_log_prob
from .sources import standard_normal_log_prob as standard_normal_log_prob
from .times import edm_skewed as edm_skewed
from .times import logit_normal as logit_normal
from .times import uniform as uniform
from .types import Coupling as Coupling
from .types import Divergence as Divergence
from .types import PathSample as PathSample
from .types import SourceLogProb as SourceLogProb
from .types import TimeSampler as TimeSampler
from .types import Velocity as Velocity
from .types import per_example as per_example

__version__ = "0.1.0"
