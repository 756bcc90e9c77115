"""Trains a VQ tokenizer, on the small data sets or on a folder of images, or fine-tunes a published one.

    python -m mirai_jax.tokenize --config=configs/tokenizer.py[:scale] [--config.field=value ...]
    python -m mirai_jax.extract --images=FOLDER --tokenizer=WORKDIR --out=CODES
    python -m mirai_jax.main --config=configs/mirai_e.py:SCALE --config.tokenizer.name=vq \\
        --config.tokenizer.path=WORKDIR --config.data.path=CODES

On all devices of this machine. Exit status: 0 finished; 1 an error to mend; 75 stopped by SIGTERM, with
all saved: the same command resumes.
"""

from mirai_jax.config import unused
from mirai_jax.tokenizing.settings import TokenizerRunConfig
from mirai_jax.tokenizing.train import tokenize
from mirai_jax.training import local
from mirai_jax.utils import cli

_FLAGS, parse_flags, main = local.door(
    __name__, "configs/tokenizer.py:folder", TokenizerRunConfig, unused.TOKENIZER, tokenize
)

if __name__ == "__main__":
    cli.run(main, flags_parser=parse_flags)
