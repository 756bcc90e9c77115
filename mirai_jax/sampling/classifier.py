"""Class accuracy of samples of small labelled images, by a classifier of the real ones."""

import numpy as np

_FITTED_ON = 5_000  # training images: a support-vector machine's time grows with their square
_SIDE = 32  # pixels of what it sees at most: the time grows with their number, too


def fit_classifier(images_NxHxWxC: np.ndarray, labels_N: np.ndarray):
    """A support-vector classifier (scikit-learn) of uint8 images, fitted to their raw pixels.

    Of many images, about 5,000 spread evenly are used. Larger images than 32 pixels are shrunk.
    """
    from sklearn.dummy import DummyClassifier  # here: slow to import, and only the end needs it
    from sklearn.svm import SVC

    some = fitted_on(len(labels_N))
    if len(np.unique(labels_N[some])) < 2:  # a folder of one class is no problem for the rest
        return DummyClassifier().fit(_pixels(images_NxHxWxC[some]), labels_N[some])
    return SVC(C=10, gamma="scale").fit(_pixels(images_NxHxWxC[some]), labels_N[some])


def fitted_on(count: int) -> slice:
    """Those of `count` training images that the classifier is fitted to."""
    return slice(None, None, max(1, count // _FITTED_ON))


def _pixels(images_NxHxWxC: np.ndarray) -> np.ndarray:
    """float32 (N, pixels), each the mean of a square where images are large."""
    count, height, width, channels = images_NxHxWxC.shape
    step = -(-max(height, width) // _SIDE)
    if step > 1:
        rows, columns = height // step, width // step
        squares = images_NxHxWxC[:, : rows * step, : columns * step]
        squares = squares.reshape(count, rows, step, columns, step, channels)
        images_NxHxWxC = squares.mean(axis=(2, 4), dtype=np.float32)
    return images_NxHxWxC.reshape(count, -1).astype(np.float32) / 255


def decision_values(classifier, images_NxHxWxC: np.ndarray) -> np.ndarray:
    """float64 (N, classes): how far the classifier is for each class (two or one class: one value)."""
    decide = getattr(classifier, "decision_function", lambda x: np.zeros(len(x)))  # of one class
    return decide(_pixels(images_NxHxWxC)).reshape(len(images_NxHxWxC), -1)


def recognised(classifier, images_NxHxWxC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """bool (N,): which uint8 images the classifier assigns to their label."""
    return classifier.predict(_pixels(images_NxHxWxC)) == labels_N


def class_accuracy(classifier, images_NxHxWxC: np.ndarray, labels_N: np.ndarray) -> float:
    """The fraction of uint8 images that the classifier assigns to their label, in [0, 1]."""
    return float(np.mean(recognised(classifier, images_NxHxWxC, labels_N)))
