"""A page to try one model, or two side by side, made with Gradio."""

from __future__ import annotations

import hmac
import io
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from PIL import Image

from hf_cifar.config.serving import DemoConfig
from hf_cifar.errors import UserError
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.predict import Predictor
from hf_cifar.serve.guard import Guard
from hf_cifar.serve.heatmap import Heatmap
from hf_cifar.serve.listener import listening, url_of
from hf_cifar.text import enumerated

if TYPE_CHECKING:
    import gradio as gr

logger = logging.getLogger(__name__)
KEPT_SECONDS = 600  # of an uploaded file
MAX_WAITING = 64  # predictions
STYLE = ".whole img { width: 100%; height: 100%; object-fit: contain; }"  # also of small pictures
COLUMN_PIXELS = 240  # at least: a picture and two models fit side by side on a screen of 1200
# Gradio's own would be fetched from Google.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def serve_demo(
    models: Mapping[str, Predictor], examples: Sequence[Path], config: DemoConfig
) -> None:
    """Show the page of models, by name, until a signal ends it. examples: image files.

    Uploads are in a temporary folder, which is removed at the end.
    Raises: UserError if the address cannot be used.
    """
    import gradio as gr

    with tempfile.TemporaryDirectory(prefix="hf_cifar-demo-") as folder, listening(config) as port:
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        gr.mount_gradio_app(
            app, build_page(models, examples), "/",
            auth=None if config.api_key is None else _keeper(config.api_key),
            auth_message="Enter any name, and the key as the password", max_file_size=config.max_bytes,
            theme=gr.themes.Default(**FONTS), css=STYLE, footer_links=[], run_history=False, pwa=False,
            ssr_mode=False, enable_monitoring=False, show_error=True,
        )  # fmt: skip
        logger.info("the demo is at %s; Ctrl-C ends it", url_of(port))
        server = uvicorn.Server(
            uvicorn.Config(
                Guard(app, config.max_bytes), log_level="critical", ws="none", server_header=False,
                timeout_graceful_shutdown=1, loop="asyncio",
            )
        )  # fmt: skip
        server.run(sockets=[port])


def _keeper(key: str) -> Any:
    """Return a function that takes a name and a password, and returns True for the right password."""
    return lambda name, password: hmac.compare_digest(password.encode(), key.encode())


def build_page(models: Mapping[str, Predictor], examples: Sequence[Path]) -> gr.Blocks:
    """Build the page: a picture on one side, and for each model its bars and its heat map."""
    import gradio as gr

    heatmaps = {name: Heatmap(predictor) for name, predictor in models.items()}
    for name, predictor in models.items():
        if predictor.rejection is not None:
            logger.info(
                "the demo shows classes for every image, even where hf-cifar predict answers %r for %s",
                predictor.rejection.answer, name,
            )  # fmt: skip
    title = enumerated(list(models))
    with gr.Blocks(
        title=title, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as page:
        gr.Markdown(f"# {title}\nChoose or drop a picture, paste one, or take one with the camera.")
        outputs: list[gr.Component] = []
        with gr.Row():
            with gr.Column(min_width=COLUMN_PIXELS):
                # The file as it was uploaded: the model's own preprocessing decodes it.
                image = gr.Image(
                    type="filepath", image_mode=None, label="Picture", height=320,
                    sources=["upload", "webcam", "clipboard"],
                    webcam_options=gr.WebcamOptions(mirror=False), buttons=["fullscreen"],
                    elem_classes="whole",
                )  # fmt: skip
                # Gradio itself would open the file, and show its own error with a path of this machine.
                image.preprocess = _path_of
                with_map = gr.Checkbox(
                    label="Heat map",
                    info="Orange: pixels that support the answer (Grad-CAM). Coarse maps may show none.",
                    visible=any(each.available for each in heatmaps.values()),
                )  # fmt: skip
            for name, predictor in models.items():
                with gr.Column(min_width=COLUMN_PIXELS):
                    outputs.append(
                        gr.Label(
                            label=name, num_top_classes=predictor.top_k,
                            show_heading=not is_multi_label(predictor.model),
                        )
                    )  # fmt: skip
                    outputs.append(
                        gr.Image(
                            label=f"Heat map of {name}", visible=False, interactive=False, height=320,
                            buttons=["fullscreen", "download"], elem_classes="whole",
                        )
                    )  # fmt: skip

        if examples:
            gr.Examples([str(path) for path in examples], image, label="Examples")

        def answer(path: str | None, with_map: bool) -> list[Any]:
            found: list[Any] = []
            for name, predictor in models.items():
                try:
                    found += _answer(path, predictor, heatmaps[name] if with_map else None)
                except UserError as error:
                    raise gr.Error(str(error), print_exception=False) from None
            return found

        gr.on(
            [image.change, with_map.change], answer, [image, with_map], outputs, api_name="predict",
            show_progress="minimal", trigger_mode="always_last",
        )  # fmt: skip
    return page.queue(max_size=MAX_WAITING)


def _path_of(file: Any) -> str | None:
    """Return the path of an uploaded file."""
    return None if file is None else file.path


def _answer(path: str | None, predictor: Predictor, heatmap: Heatmap | None) -> tuple[Any, Any]:
    """Return what is shown of a picture: its scores by label, and its heat map."""
    import gradio as gr

    if path is None:
        return None, gr.Image(None, visible=False)
    image = predictor.preprocessor.decode(Path(path))
    top_k = predictor.record(predictor.scores([image])[0])["top_k"]
    scores = {each["label"]: each["score"] for each in top_k}
    if heatmap is None or not heatmap.available:
        return scores, gr.Image(None, visible=False)
    return scores, gr.Image(Image.open(io.BytesIO(heatmap(image))), visible=True)
