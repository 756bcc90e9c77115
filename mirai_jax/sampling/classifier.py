"""Judging samples. For labelled small images: does a classifier see the class that was asked for?"""

import numpy as np

_JUDGED_ON = 5_000  # training images: a support-vector machine's time grows with their square


def fit_classifier(images_NxHxWxC: np.ndarray, labels_N: np.ndarray):
    """A support-vector classifier of raw pixels (scikit-learn), for small grey images.

    Args:
        images_NxHxWxC: uint8, real training images; of many, about 5,000 spread evenly are used.
        labels_N: int.

    Returns:
        A fitted classifier; `class_accuracy` asks it.
    """
    from sklearn.svm import SVC  # here: slow to import, and only the end of a run needs it

    some = slice(None, None, max(1, len(labels_N) // _JUDGED_ON))
    return SVC(C=10, gamma="scale").fit(_pixels(images_NxHxWxC[some]), labels_N[some])


def _pixels(images_NxHxWxC: np.ndarray) -> np.ndarray:
    return images_NxHxWxC.reshape(len(images_NxHxWxC), -1).astype(np.float32) / 255


def class_accuracy(judge, images_NxHxWxC: np.ndarray, labels_N: np.ndarray) -> float:
    """The fraction of uint8 images that the judge assigns to their label, in [0, 1]."""
    return float(np.mean(judge.predict(_pixels(images_NxHxWxC)) == labels_N))
