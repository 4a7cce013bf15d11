"""Average velocities: flows in one step or a few, and the losses that train them."""

from .average import AverageVelocity as AverageVelocity
from .average import flow_map as flow_map
from .average import instantaneous as instantaneous
from .consistency import consistency_loss as consistency_loss
from .consistency import ect_next as ect_next
from .consistency import ect_times as ect_times
from .consistency import ect_weight as ect_weight
from .losses import adaptive_weight as adaptive_weight
from .losses import alpha_flow_loss as alpha_flow_loss
from .losses import improved_mean_flow_loss as improved_mean_flow_loss
from .losses import mean_flow_loss as mean_flow_loss
from .losses import terminal_velocity_loss as terminal_velocity_loss
from .sampling import sample_renoised as sample_renoised
from .sampling import sample_steps as sample_steps
from .time_pairs import TimePair as TimePair
from .time_pairs import clip_end as clip_end
from .time_pairs import ordered_times as ordered_times
from .time_pairs import sort_times as sort_times
