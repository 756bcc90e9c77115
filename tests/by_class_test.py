"""Metrics class by class, against direct loops, and from folders, files and a program."""

import json

import numpy as np
import pytest
import scipy.linalg
from evaluate_test import pictures, program, save_folder

from mirai_jax.evaluation import by_class, image_streams
from mirai_jax.sampling.classifier import class_accuracy, decision_values, fit_classifier
from mirai_jax.utils.errors import DataError

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_each_class_has_the_distance_of_its_images(monkeypatch):
    monkeypatch.setattr(by_class, "FEWEST", 6)
    rng = np.random.RandomState(0)
    labels, theirs = rng.permutation([0] * 6 + [2] * 20 + [3] * 5), rng.permutation([0, 2, 3] * 9)
    fake, real = rng.normal(size=(31, 4)), rng.normal(1, 2, size=(27, 4))
    rows = by_class.by_class(labels, fake, theirs, real, list("abcd"))
    assert [(row["class"], row["samples"], row["reference"]) for row in rows] == [
        ("a", 6, 9), ("c", 20, 9), ("d", 5, 9)
    ]  # fmt: skip
    for row, label in zip(rows[:2], (0, 2), strict=True):
        x, y = fake[labels == label], real[theirs == label]
        root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
        spread = np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root
        expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(spread)
        assert row["distance"] == pytest.approx(expected, rel=1e-6)
    assert "distance" not in rows[2]  # too few
    with pytest.raises(DataError, match="left out"):
        by_class.by_class(labels, fake[1:], theirs, real, list("abcd"))


def test_where_all_classes_are_too_small_there_is_no_picture(tmp_path):
    rows = [{"class": "a", "samples": 9, "reference": 9}]
    assert not by_class.figure(tmp_path / "a.png", rows, "FID")
    assert not (tmp_path / "a.png").exists() and "| a | 9 | 9 | - | - |" in by_class.table(
        rows, "FID"
    )


def test_classes_are_matched_by_name(tmp_path):
    def stream(name, folders):
        for folder in folders:
            save_folder(tmp_path / name / folder, pictures(2))
        return image_streams.open_stream(str(tmp_path / name))

    real, samples = stream("real", "abc"), stream("samples", "ca")
    labels, names = by_class.common_labels(samples, real)
    assert sorted(names[label] for label in labels) == ["a", "a", "c", "c"]
    assert labels.tolist() == [{"a": 0, "c": 2}[samples.classes[i]] for i in samples.labels]
    with pytest.raises(DataError, match="no class 'd'"):
        by_class.common_labels(stream("other", "ad"), real)
    np.savez(tmp_path / "numbers.npz", arr_0=pictures(2), arr_1=np.array([0, 700]))
    with pytest.raises(DataError, match="class 700"):
        by_class.common_labels(image_streams.open_stream(str(tmp_path / "numbers.npz")), real)
    save_folder(tmp_path / "flat", pictures(3))
    with pytest.raises(DataError, match="no labels"):
        by_class.common_labels(image_streams.open_stream(str(tmp_path / "flat")), real)


@pytest.mark.slow
def test_the_program_writes_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(by_class, "FEWEST", 4)
    images, labels = pictures(12), np.arange(12) % 3
    np.savez(tmp_path / "samples.npz", arr_0=images, labels=labels)
    for label in range(3):
        save_folder(tmp_path / "real" / str(label), pictures(4 + label, seed=label))
    flags = f"--samples={tmp_path / 'samples.npz'}", f"--reference={tmp_path / 'real'}"
    program(*flags, "--by_class", "--batch_size=4")
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(r["samples"], r["reference"]) for r in row["by_class"]] == [(4, 4), (4, 5), (4, 6)]
    assert all(r["distance"] > 0 and "class_accuracy" not in r for r in row["by_class"])
    assert "| 2 | 4 | 6 |" in capsys.readouterr().out and (tmp_path / "by_class.png").exists()


def test_a_sample_is_recognised_by_the_classifier_of_the_training_images(tmp_path, monkeypatch):
    train, labels = pictures(40), np.arange(40) % 2
    train[labels == 1] //= 4
    found = type("Images", (), {"images": train, "labels": labels})
    monkeypatch.setattr(by_class.restore, "read_settings", lambda *_: None)
    monkeypatch.setattr(by_class.components, "labelled_images", lambda *_: found)
    images, asked = train[:7].copy(), labels[:7].copy()
    asked[3] = 1 - asked[3]
    stream = image_streams.of_array("samples", images)
    hits = by_class.recognised_of("data:run:held_out", stream, asked)
    assert hits.tolist() == [i != 3 for i in range(7)]
    assert hits.mean() == class_accuracy(fit_classifier(train, labels), images, asked)
    assert by_class.recognised_of("folder", stream, asked) is None


def test_the_classifier_sees_large_images_shrunk():
    """Else its time at the end of a run of photographs is longer than that of the run."""
    images = np.random.RandomState(0).randint(0, 256, (40, 32, 32, 3), np.uint8)
    large = images.repeat(8, axis=1).repeat(8, axis=2)
    small, other = (fit_classifier(x, np.arange(40) % 4) for x in (images, large))
    assert other.n_features_in_ == 32 * 32 * 3
    expected = decision_values(small, images)
    np.testing.assert_allclose(decision_values(other, large), expected, rtol=1e-5)
