"""The study's stage 0: the learning rate at which each of LlamaGen and Mirai-E does best.

    python -m launch.sweep --sweep=launch/sweeps/study_rates.py --scale=fashion_mnist

Two epochs of a cosine to zero, one seed. The later stages (study_direction.py and on) train six epochs,
each arm at its own rate, so that no arm gains from a rate that suits it better.
"""

from launch.overrides import over, product

STEPS_PER_EPOCH = 1_875  # 60,000 images, batches of 32
START_SHARE = 0.19  # of the run, after which Mirai-E starts: 15 of 80 epochs, as published

BASELINE, MIRAI_E = "configs/llamagen.py", "configs/mirai_e.py"


def recipe(epochs: int) -> dict:
    """The fields that all runs of the study share."""
    return {
        "num_steps": epochs * STEPS_PER_EPOCH,
        "optimizer.schedule": "cosine",
        "ema_decay": 0.999,
        "checkpoint_every": 1_250,
        "keep_every": 1_250,
    }


def get_sweep(scale: str):
    del scale  # the sizes above are of fashion_mnist
    epochs = 2
    start = {"foresight[0].start_epoch": START_SHARE * epochs}
    arms = [{"config": BASELINE}, {"config": MIRAI_E, **start}]
    rates = over("optimizer.learning_rate", [1e-3, 2e-3, 4e-3])
    return [{**run, **recipe(epochs), "seed": 0} for run in product(rates, arms)]
