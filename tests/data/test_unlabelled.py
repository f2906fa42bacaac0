"""A folder of pictures without labels, and its splits."""

import pytest
from PIL import Image

from linsight.data.loading import DataError
from linsight.data.unlabelled import PictureFolder


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(folder / name)


def names(data):
    return [data.name_of(i).rpartition("/")[2] for i in range(len(data))]


def test_every_tenth_is_kept_apart(tmp_path):
    write(tmp_path, *(f"{i:02d}.png" for i in range(11)))
    assert names(PictureFolder(str(tmp_path), "val")) == ["00.png", "10.png"]
    assert names(PictureFolder(str(tmp_path))) == [f"{i:02d}.png" for i in range(1, 10)]


def test_folders_of_splits(tmp_path):
    write(tmp_path, "train/a.png", "train/deep/b.png", "val/c.png", "other/d.png")
    assert names(PictureFolder(str(tmp_path))) == ["a.png", "b.png"]
    assert names(PictureFolder(str(tmp_path), "val")) == ["c.png"]


def test_pictures_repeat(tmp_path):
    write(tmp_path, "train/a.png", "train/b.png", "val/c.png")
    data = PictureFolder(str(tmp_path), length=5, transform={"input_size": 8})
    assert names(data) == ["a.png", "b.png", "a.png", "b.png", "a.png"]
    image, label = data[4]
    assert (tuple(image.shape), label) == ((3, 8, 8), 0)


def test_nothing_to_learn_from(tmp_path):
    with pytest.raises(DataError, match="holds no pictures: give one with some by --data"):
        PictureFolder(str(tmp_path))
    with pytest.raises(DataError, match="does not exist: give one by --data"):
        PictureFolder(str(tmp_path / "none"))
