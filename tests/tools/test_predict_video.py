"""Videos that cannot be read, and videos that cannot be written."""

import pytest

pytest.importorskip("cv2", reason="videos need OpenCV")

import cv2
import numpy as np
from PIL import Image
from rich.progress import Progress

from linsight.data.loading import DataError
from linsight.tools.predict_video import predict_video
from linsight.tools.prediction import Prediction

from .conftest import full_disk


class Mirror:
    columns = ("width",)

    def __call__(self, picture: Image.Image) -> Prediction:
        return Prediction("", [picture.size[:1]], picture.transpose(Image.Transpose.ROTATE_180))


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48))
    for frame in np.random.default_rng(0).integers(256, size=(6, 48, 64, 3), dtype=np.uint8):
        writer.write(frame)
    writer.release()
    return path


def test_a_full_disk_leaves_what_was_there(clip, tmp_path):
    target = tmp_path / "out.mp4"
    assert predict_video(Mirror(), clip, target, Progress()) == [[(64,)]] * 6
    before = target.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(OSError, match=r"out\.mp4: is the disk full"):
        predict_video(Mirror(), clip, target, Progress())
    assert target.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.avi", "out.mp4"]


@pytest.mark.parametrize("kept", [0, 300])
def test_a_truncated_video(clip, tmp_path, kept):
    clip.write_bytes(clip.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"clip\.avi \(no frame of it can be read"):
        predict_video(Mirror(), clip, tmp_path / "out.mp4", Progress())
    assert not (tmp_path / "out.mp4").exists()


def test_half_a_video_is_predicted_as_far_as_it_goes(clip, tmp_path):
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) * 2 // 3])
    rows = predict_video(Mirror(), clip, tmp_path / "out.mp4", Progress())
    assert 1 <= len(rows) < 6
    assert cv2.VideoCapture(str(tmp_path / "out.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == len(rows)
