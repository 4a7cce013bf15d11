"""From a training step to a run folder: tasks, flags, the loop, what a run survives.

What an experiment needs is here; other modules are imported by name. It needs the extra `train`.
"""

from .config import RunConfig as RunConfig
from .fit import fit as fit
from .read import load as load
from .start import main as main
from .start import train as train
from .step import optimizer as optimizer
from .step import skip_not_finite as skip_not_finite
from .task import Samples as Samples
from .task import Task as Task
from .task import Trained as Trained
from .task import from_loss as from_loss
