"""The study's stage 5: the direction at four times the tokens: 16x16 of 2x2 pixels, 5.4 M parameters, one seed.

    python -m launch.sweep --sweep=launch/sweeps/study_tokens.py --scale=fashion_mnist

The recipe of study_direction.py with half its learning rate, which was not searched at this size. On a GPU,
`--scale=fashion_mnist_medium` has 21 M parameters and a recipe of that size: variants.py and controls.py.
"""

from launch.sweeps import study_direction

MODEL = {
    "model.grid": (16, 16),
    "model.num_layers": 6,
    "model.width": 256,
    "tokenizer.patch": 2,
    "optimizer.learning_rate": 2e-3,
}


def get_sweep(scale: str):
    runs = [{**run, **MODEL} for run in study_direction.get_sweep(scale) if run["seed"] == 0]
    wide = {"foresight[0].projector_width": 512}
    return [{**run, **(wide if run["name"] != "llamagen" else {})} for run in runs]
