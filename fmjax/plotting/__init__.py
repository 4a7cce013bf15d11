"""Pictures for notebooks and run folders: grids, curves, flows in the plane, animations.

A picture is a uint8 array `[height, width, 3]`, whatever it shows. `save` writes it as PNG,
`animation` several of one size as GIF, and a notebook shows it where
`PIL.Image.fromarray(picture)` is the last line of a cell. Arrays go in, NumPy's or JAX's; nothing
here looks at a run, a model or a device.
"""

from .animations import animation as animation
from .animations import image_frames as image_frames
from .animations import plane_frames as plane_frames
from .corners import corner as corner
from .curves import cost_curve as cost_curve
from .curves import loss_curve as loss_curve
from .grids import beside as beside
from .grids import by_class as by_class
from .grids import grid as grid
from .panels import grid_points as grid_points
from .panels import limits as limits
from .pictures import picture as picture
from .pictures import save as save
from .planes import density as density
from .planes import plane as plane
from .planes import samples_and_density as samples_and_density
from .planes import trajectories as trajectories
from .planes import ways as ways
