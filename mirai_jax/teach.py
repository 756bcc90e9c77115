"""Trains an encoder as teacher of Mirai-I, on the data set itself.

    python -m mirai_jax.teach --config=configs/teacher.py[:scale] [--config.field=value ...]
    python -m mirai_jax.main --config=configs/mirai_i.py[:scale] --config.teacher.name=dinov2 \\
        --config.teacher.path=WORKDIR --config.teacher.image_size=0

On all devices of this machine. Exit status: 0 finished; 1 an error to mend; 75 stopped by SIGTERM, with
all saved: the same command resumes.
"""

from mirai_jax.config import unused
from mirai_jax.teaching.settings import TeacherRunConfig
from mirai_jax.teaching.train import teach
from mirai_jax.training import local
from mirai_jax.utils import cli

_FLAGS, parse_flags, main = local.door(
    __name__, "configs/teacher.py:fashion_mnist", TeacherRunConfig, unused.ENCODER, teach
)

if __name__ == "__main__":
    cli.run(main, flags_parser=parse_flags)
