"""LitServe set up as in its documentation: dynamic batches of decoded images, a worker on each core.

python -m benchmarks.serving_litserve RUN PORT
"""

import io
import sys
from typing import Any

import litserve
import torch
from fastapi import Request, Response  # LitServe reads these annotations, as classes
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

BATCH_SIZE, BATCH_SECONDS = 16, 0.005


class Classifier(litserve.LitAPI):
    """A saved model behind LitServe."""

    def __init__(self, run: str, **options: Any) -> None:
        super().__init__(**options)
        self.run = run

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForImageClassification.from_pretrained(self.run).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(self.run)

    def decode_request(self, request: Request) -> Image.Image:  # a form with its files
        return Image.open(io.BytesIO(request["file"].file.read())).convert("RGB")

    @torch.inference_mode()
    def predict(self, images: Any) -> list[list[dict[str, Any]]]:
        inputs = self.image_processor(images, return_tensors="pt")
        scores = self.model(**inputs).logits.softmax(dim=1)
        top = scores.topk(min(5, scores.shape[1]))
        names = self.model.config.id2label
        return [
            [{"label": names[int(i)], "score": float(s)} for s, i in zip(*row, strict=True)]
            for row in zip(top.values, top.indices, strict=True)
        ]

    def encode_response(self, output: Any) -> Response:  # JSON of it
        return output


if __name__ == "__main__":
    api = Classifier(sys.argv[1], max_batch_size=BATCH_SIZE, batch_timeout=BATCH_SECONDS)
    workers = torch.get_num_threads()
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, timeout=60)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="error"
    )
