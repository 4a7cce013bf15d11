"""Solving dx/dt = v(t, x), for samples and for likelihoods."""

from .call import SolveOptions as SolveOptions
from .divergences import exact_divergence as exact_divergence
from .divergences import hutchinson_divergence as hutchinson_divergence
from .divergences import hutchinson_estimates as hutchinson_estimates
from .each import Attempts as Attempts
from .each import EachOptions as EachOptions
from .each import EachTrajectory as EachTrajectory
from .each import PerRow as PerRow
from .each import attempt_each as attempt_each
from .each import integrate_each as integrate_each
from .each import log_prob_each as log_prob_each
from .each import sample_each as sample_each
from .likelihood import LikelihoodOptions as LikelihoodOptions
from .likelihood import LogProb as LogProb
from .likelihood import bits_per_dim as bits_per_dim
from .likelihood import integrate_log_prob as integrate_log_prob
from .likelihood import log_prob as log_prob
from .likelihood import sample_and_log_prob as sample_and_log_prob
from .ode import Trajectory as Trajectory
from .ode import integrate as integrate
from .ode import sample as sample
from .sde import sample_sde as sample_sde
