"""Eight host devices and no silent rank promotion, before anything asks for a device."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
