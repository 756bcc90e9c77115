"""Eight simulated devices for the mesh tests; numerics in full float32."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
