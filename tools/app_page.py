"""The page of `linsight app`, made of Gradio's components."""

from __future__ import annotations

import html
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from linsight.data.digits import CLASSES, DETECTION, digit_scene
from linsight.data.pictures import read_picture
from linsight.tools.look import Looker
from linsight.tools.prediction import Predictor, render
from linsight.tools.results import Classes, Objects, Regions, Result

# Gradio's default theme has these fonts in its package.
_THEME = gr.themes.Default()


def launch(
    predictor: Predictor,
    title: str,
    device: torch.device,
    max_pixels: int | None,
    host: str,
    port: int,
    wait: bool = True,
) -> gr.Blocks:
    """Serve a page that predicts the pictures dropped on it, one at a time.

    Args:
        predictor: the model.
        title: heading of the page.
        device: where the model runs.
        max_pixels: larger pictures are refused; None for what memory holds, by an estimate.
        host, port: where to listen.
        wait: whether to serve until the process is interrupted; otherwise a thread serves until
            the returned page is closed.
    """
    # The first pass compiles what the model needs, and shows of which kind it is.
    first = Image.fromarray(digit_scene(0, "test", **DETECTION).image)
    result = predictor.predict(first)
    limit = max_pixels or pixels_that_fit(result, device)
    page = build_page(Answers(predictor, limit, device), title, examples(result))
    page.launch(
        server_name=host,
        server_port=port,
        theme=_THEME,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        # A pixel has up to 8 bytes, in a TIFF of 16 bits with alpha.
        max_file_size=8 * limit + (1 << 20),
        state_session_capacity=100,
        prevent_thread_lock=not wait,
    )
    return page


def pixels_that_fit(result: Result, device: torch.device) -> int:
    """The pixels of the largest picture whose prediction takes half of the memory, roughly.

    Args:
        result: what the model gave of any picture.
        device: where it runs.
    """
    # The picture, its copies and its drawing.
    need = 64
    match result:
        case Objects(masks=np.ndarray()):
            need += 100 * 4  # as many masks, each pasted as float32
        case Regions(names=names):
            # Logits and their resized copy, and the maps of a model that sees the picture whole.
            need += len(names) * 8 + 1024
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(memory // (2 * need), Image.MAX_IMAGE_PIXELS or 1 << 28)


def examples(result: Result) -> list[Image.Image]:
    """Pictures to try a model on: digit scenes for a model of digits, or else photographs."""
    if set(result.names) - {"background"} != set(CLASSES):
        from sklearn.datasets import load_sample_images

        photographs: Any = load_sample_images()
        return [Image.fromarray(image) for image in photographs.images]
    settings = {"size": 64, "digit_size": (0.7, 0.95)} if isinstance(result, Classes) else DETECTION
    return [Image.fromarray(digit_scene(i, "test", **settings).image) for i in range(4)]


class Answers:
    """What the page shows of a picture.

    Args:
        predictor: the model.
        max_pixels: larger pictures are refused.
        device: where the model runs.
    """

    def __init__(self, predictor: Predictor, max_pixels: int, device: torch.device) -> None:
        self.predictor, self.max_pixels, self.device = predictor, max_pixels, device
        self.looker = Looker.of(predictor)

    def read(self, file: str | Path) -> Image.Image:
        """Read a picture in RGB.

        Raises:
            gr.Error: the file is no picture, or its picture is too large.
        """
        name = Path(file).name
        try:
            with Image.open(file) as image:
                width, height = image.size
            if width * height <= self.max_pixels:
                return read_picture(file)
        except Image.DecompressionBombError:
            raise _error(f"{name} is larger than {self.max_pixels:,} pixels") from None
        except ValueError as error:
            raise _error(f"{name}: {error}") from error
        # Pillow raises OSError, SyntaxError, struct.error, ..., depending on the format.
        except Exception as error:
            raise _error(f"{name} is no picture, or it is damaged") from error
        raise _error(
            f"{name} has {width} x {height} pixels, and at most {self.max_pixels:,} are taken: "
            "give a smaller one, or start with another --max-pixels"
        )

    def predict(self, picture: Image.Image) -> tuple[Image.Image, str, list[list], Tensor | None]:
        """The drawing, the time, the rows of the table, and the image that the model gets.

        Raises:
            gr.Error: the model does not take the picture, or memory does not hold it.
        """
        with one_line():
            start = time.perf_counter()
            result = self.predictor.predict(picture)
            took = time.perf_counter() - start
            prediction = self.predictor.describe(picture, result)
            image = self.looker.predictor.prepare(picture).cpu() if self.looker else None
        said = f"{1000 * took:.0f} ms for {picture.width} x {picture.height} pixels"
        return prediction.drawing, said, [list(row) for row in prediction.rows], image

    def look(
        self, image: Tensor, point: tuple[float, float] = (0.5, 0.5)
    ) -> tuple[Image.Image, Image.Image]:
        """The image that the model gets, and the drawing of what it sees from a point of it.

        Raises:
            gr.Error: memory does not hold it.
        """
        looker = cast(Looker, self.looker)
        with one_line():
            return looker.show(image), render(looker.draw(image.to(self.device), point), dpi=100)


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what a picture may cause into one line on the page.

    Raises:
        gr.Error: in place of what is raised.
    """
    try:
        yield
    except ValueError as error:  # for example, the picture is too small for the model
        raise _error(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "memory" not in said:
            raise
        raise _error("the picture does not fit into memory: give a smaller one") from error


def _error(message: str) -> gr.Error:
    # Gradio takes the message for HTML, and names of files are a visitor's.
    line = html.escape(message.strip().partition("\n")[0], quote=False)
    return gr.Error(line, duration=None, print_exception=False)


def build_page(answers: Answers, title: str, pictures: list[Image.Image]) -> gr.Blocks:
    """The page.

    Args:
        answers: what it shows.
        title: its heading.
        pictures: examples.
    """
    # Without the one that shares with another machine.
    buttons: Any = ["download", "fullscreen"]
    # Pictures of a visitor are deleted an hour after they came.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {title}\nPictures of at most {answers.max_pixels:,} pixels.")
        image = gr.State()
        with gr.Row():
            with gr.Column():
                file = gr.File(label="A picture")
                gallery = gr.Gallery(
                    pictures, label="Examples", columns=2, height=240, allow_preview=False,
                    interactive=False, buttons=[],
                )  # fmt: skip
                seen = gr.Image(
                    label="As the model gets it: click a point to look from", interactive=False,
                    buttons=[], visible=answers.looker is not None,
                )  # fmt: skip
            with gr.Column(scale=2):
                drawing = gr.Image(
                    label="Prediction", interactive=False, format="png", buttons=buttons
                )
                took = gr.Textbox(label="Time", interactive=False)
                table = gr.Dataframe(headers=list(answers.predictor.columns), interactive=False)
        looks = gr.Image(
            label="Features as colours, and attention from the point", interactive=False,
            format="png", buttons=buttons, visible=answers.looker is not None,
        )  # fmt: skip

        def from_file(path: str) -> tuple:
            # The file is taken off the page, which so takes the next one, also after an error.
            try:
                return (*answers.predict(answers.read(path)), None)
            except gr.Error as error:
                gr.Warning(error.message, duration=None, title="Refused")
                return None, "", None, None, None

        def from_example(event: gr.SelectData) -> tuple:
            return answers.predict(pictures[event.index])

        def look(x: Tensor | None) -> tuple:
            return (None, None) if x is None else answers.look(x)

        def from_point(x: Tensor, event: gr.SelectData) -> Image.Image:
            height, width = x.shape[-2:]
            column, row = event.index
            return answers.look(x, ((column + 0.5) / width, (row + 0.5) / height))[1]

        # The device serves one request at a time.
        single: Any = {"concurrency_id": "device", "concurrency_limit": 1, "api_name": False}
        results = [drawing, took, table, image]
        uploaded = file.upload(from_file, file, [*results, file], **single)
        chosen = gallery.select(from_example, None, results, **single)
        if answers.looker:
            for event in (uploaded, chosen):
                event.success(look, image, [seen, looks], **single)
            seen.select(from_point, image, looks, **single)
    return page
