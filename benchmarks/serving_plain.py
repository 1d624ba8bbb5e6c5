"""FastAPI with transformers' pipeline in the handler, which FastAPI runs in its thread pool.

python -m benchmarks.serving_plain RUN PORT
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image
from transformers import pipeline

if __name__ == "__main__":
    app = FastAPI()
    classify = pipeline("image-classification", model=sys.argv[1], device="cpu")

    @app.post("/predict")
    def predict(file: UploadFile) -> list[dict[str, Any]]:
        """Classify an image."""
        return classify(Image.open(file.file).convert("RGB"))

    uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
