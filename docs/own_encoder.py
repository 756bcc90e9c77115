"""An encoder of yours as the teacher of Mirai-I: here two convolutions.

    python -m mirai_jax.main --config=configs/mirai_i.py \\
        --config.teacher.name=docs.own_encoder:Encoder --config.teacher.path=weights.npz

The interface is that of `OwnTeacher` in mirai_jax/models/teacher.py.
"""

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util


class Encoder(nn.Module):
    """RGB images (B, H, W, 3) in [0, 1] -> features (B, H / 4, W / 4, Z)."""

    feature_width: int = 64

    @nn.compact
    def __call__(self, images_BxHxWx3: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(32, (3, 3), (2, 2), name="conv1")(2 * images_BxHxWx3 - 1))
        return nn.Conv(self.feature_width, (3, 3), (2, 2), name="conv2")(x)

    @staticmethod
    def load(path: str):
        """The weights of a file {'conv1/kernel': array, ...}; random ones if there is no path."""
        encoder = Encoder()
        if not path:
            return encoder, encoder.init(jax.random.key(0), np.zeros((1, 32, 32, 3)))["params"]
        with np.load(path) as file:
            return encoder, traverse_util.unflatten_dict(dict(file), sep="/")
