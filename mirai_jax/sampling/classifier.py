"""Class accuracy of samples of small labelled images, by a classifier of the real ones."""

import numpy as np

_FITTED_ON = 5_000  # training images: a support-vector machine's time grows with their square


def fit_classifier(images_NxHxWxC: np.ndarray, labels_N: np.ndarray):
    """A support-vector classifier (scikit-learn) of small uint8 images, fitted to their raw pixels.

    Of many images, about 5,000 spread evenly are used.
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
    return images_NxHxWxC.reshape(len(images_NxHxWxC), -1).astype(np.float32) / 255


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
