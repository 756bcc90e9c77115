"""The heads that read the student's states in training: nothing of them is left at inference.

Shape letters: B batch, L positions, M = B * L, D student width, Z target width.
"""

import flax.linen as nn
import jax

from mirai_jax.models.generator import REMAT, Block, GeneratorConfig
from mirai_jax.models.linear import Linear

BLOCKS = 2  # of a transformer


class Projector(nn.Module):
    """Linear, SiLU, Linear, SiLU, Linear, with biases (the official `build_mlp`)."""

    width: int
    target_width: int
    dtype: str = "float32"
    initialisation: str = "normal"

    @nn.compact
    def __call__(self, x_MxD):
        x_MxD = nn.silu(self._linear(0, self.width, x_MxD))
        x_MxD = nn.silu(self._linear(1, self.width, x_MxD))
        return self._linear(2, self.target_width, x_MxD)

    def _linear(self, i: int, width: int, x_MxD: jax.Array) -> jax.Array:
        inits = {}
        if self.initialisation == "torch":
            bound = x_MxD.shape[-1] ** -0.5
            uniform = lambda *args: jax.random.uniform(*args, -bound, bound)
            inits = {"kernel_init": uniform, "bias_init": uniform}
        return Linear((width,), self.dtype, use_bias=True, name=f"linear_{i}", **inits)(x_MxD)


class TransformerProjector(nn.Module):
    """Causal blocks as the student's, RMSNorm and Linear.

    Rows are whole sequences. A position sees itself and earlier ones alone: through the projector,
    no later token reaches a state of the student.
    """

    target_width: int
    student: GeneratorConfig  # gives heads, grid and arithmetic of the blocks

    @nn.compact
    def __call__(self, x_MxD):
        config, block = self.student, Block
        if config.remat != "none":
            block = nn.remat(Block, policy=REMAT[config.remat])
        x_BxLxD = x_MxD.reshape(-1, config.length, config.width)
        for i in range(BLOCKS):
            (x_BxLxD, *_), _ = block(config, name=f"block_{i}")((x_BxLxD, (), None), (i + 1, None))
        x_MxD = nn.RMSNorm(epsilon=1e-5, dtype=config.dtype, name="norm")(
            x_BxLxD.reshape(x_MxD.shape)
        )
        return Linear((self.target_width,), config.dtype, use_bias=True, name="output")(x_MxD)


class TokenHead(nn.Module):
    """RMSNorm and a zero-initialised output layer, as at the top of the generator."""

    target_width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_MxD):
        x_MxD = nn.RMSNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x_MxD)
        zeros = nn.initializers.zeros
        return Linear((self.target_width,), self.dtype, kernel_init=zeros, name="output")(x_MxD)
