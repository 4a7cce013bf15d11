"""One training step, on one device or many; checkpoints are imported by name."""

from .averages import power_ema as power_ema
from .matrices import matrix_axes as matrix_axes
from .optimizers import adam as adam
from .optimizers import muon as muon
from .step import LossFn as LossFn
from .step import Metrics as Metrics
from .step import TrainState as TrainState
from .step import TrainStep as TrainStep
from .step import init_train_state as init_train_state
from .step import make_train_step as make_train_step
from .step import many_steps as many_steps
