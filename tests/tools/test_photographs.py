"""The photographs of installed packages, and collages of them."""

from random import Random

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from linsight.tools import photographs


def test_collages_are_drawn_from_the_photographs_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "SIDE", 96)
    split = {"sklearn": "flower.jpg", "linsight_nowhere": "none.jpg"}
    monkeypatch.setattr(
        photographs, "PHOTOGRAPHS", {"train": split, "val": {"sklearn": "china.jpg"}}
    )
    app = photographs.typer.Typer()
    app.command()(photographs.collect)
    done = CliRunner().invoke(app, [str(tmp_path), "--collages", "4"])
    assert done.exit_code == 0, done.output
    names = sorted(file.name for file in (tmp_path / "train").glob("*"))
    collages = [name for name in names if name.startswith("collage_")]
    # The photograph is there as often as collages are.
    assert collages == [f"collage_{number:04}.jpg" for number in range(4)]
    assert len(names) == 8
    assert "linsight_nowhere is not installed" in done.output
    assert not list((tmp_path / "val").glob("collage_*"))
    pictures = [np.asarray(Image.open(tmp_path / "train" / name)) for name in collages]
    assert {picture.shape for picture in pictures} == {(96, 96, 3)}
    assert not np.array_equal(pictures[0], pictures[1])
    # Those of an earlier call are no photographs.
    assert CliRunner().invoke(app, [str(tmp_path), "--collages", "4"]).exit_code == 0
    again = [np.asarray(Image.open(tmp_path / "train" / name)) for name in collages]
    assert all(map(np.array_equal, again, pictures))
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", {"train": {}, "val": {}})
    done = CliRunner().invoke(app, [str(tmp_path / "empty"), "--collages", "4"])
    assert done.exit_code == 2
    assert "there are no photographs to cut" in done.output


def test_a_number_makes_one_collage_and_only_of_what_was_given():
    red = Image.new("RGB", (60, 40), (255, 0, 0))
    first, again, other = (
        np.asarray(photographs.make_collage([red], 64, Random(seed))) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    # Pieces of one colour differ in hue and brightness, and are laid over one another.
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 3
