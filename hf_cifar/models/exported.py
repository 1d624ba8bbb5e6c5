"""An exported ONNX file as a classifier."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.models.classifier import Classifier, label2id
from hf_cifar.models.distance import RejectableOutput
from hf_cifar.models.problem_type import MULTI_LABEL
from hf_cifar.models.rejection import rejection_of
from hf_cifar.text import listed, one_line
from hf_cifar.transforms.preprocessing import Preprocessing

PIXEL_VALUES, IMAGES, LOGITS, PROBABILITIES = "pixel_values", "images", "logits", "probabilities"
DISTANCES = "distances"  # a third output of a model that rejects images
METADATA = "hf_cifar"  # the key of our metadata in a file, as JSON
CPU_PROVIDER = "CPUExecutionProvider"


class ExportedProcessor(BaseImageProcessor):
    """The preprocessing of an exported file, in place of an image processor."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing


class ExportedClassifier(PreTrainedModel):
    """The network of an ONNX file, run by ONNX Runtime on the CPU; it has no parameters.

    A session uses as many threads as torch does in the calling thread: with a batch in each thread, the
    threads share the cores.
    """

    config_class = PreTrainedConfig
    main_input_name = PIXEL_VALUES

    def __init__(self, config: PreTrainedConfig, content: bytes) -> None:
        super().__init__(config)
        self.content, self._session, self._num_threads = content, None, 0
        self.rejects = rejection_of(self) is not None
        self._lock = threading.Lock()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        """pixel_values [N, 3, h, w] -> logits [N, K] and, if the file has them, distances [N], on the same
        device."""
        images = np.ascontiguousarray(pixel_values.detach().to("cpu", torch.float32).numpy())
        wanted = [LOGITS, DISTANCES] if self.rejects else [LOGITS]
        found = self._ready_session().run(wanted, {PIXEL_VALUES: images})
        tensors = [torch.from_numpy(each).to(pixel_values.device) for each in found]
        if self.rejects:
            return RejectableOutput(logits=tensors[0], distances=tensors[1])
        return ImageClassifierOutput(logits=tensors[0])

    def _ready_session(self) -> Any:
        num_threads = torch.get_num_threads()
        with self._lock:
            if self._session is None or self._num_threads != num_threads:
                self._session = session_of(self.content, num_threads)
                self._num_threads = num_threads
            return self._session


def session_of(content: bytes, num_threads: int) -> Any:
    """Open an ONNX Runtime session on the CPU. Raises: UserError without the library."""
    onnxruntime = require("onnxruntime", extra="deploy")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    # Threads that wait actively would take the cores from the preprocessing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(content, options, providers=[CPU_PROVIDER])


def load_exported(name: str) -> Classifier:
    """Load an ONNX file that `hf-cifar export` wrote.

    Raises: UserError for any other file, and for one whose preprocessing is in the graph.
    """
    content, saved = read_onnx(name)
    if saved["input"] != PIXEL_VALUES:
        raise UserError(
            f"the preprocessing of {name} is in its graph; run it with ONNX Runtime, see docs/export.md, "
            "or export the run again without --with_preprocessing"
        )
    preprocessing = Preprocessing.from_dict(saved["preprocessor"]["preprocessing"])
    return Classifier(ExportedClassifier(_config(saved), content), ExportedProcessor(preprocessing))


def exported_config(name: str) -> PreTrainedConfig:
    """Return the config of an exported file. Raises: UserError as `load_exported`."""
    return _config(read_onnx(name)[1])


def _config(saved: dict[str, Any]) -> PreTrainedConfig:
    id2label, thresholds = dict(enumerate(saved["labels"])), saved["thresholds"]
    return PreTrainedConfig(
        id2label=id2label,
        label2id=label2id(id2label),
        problem_type=None if thresholds is None else MULTI_LABEL,
        thresholds=thresholds,
        value_range=saved["preprocessor"]["value_range"],
        reject=saved.get("reject"),
    )


def read_onnx(name: str) -> tuple[bytes, dict[str, Any]]:
    """Read an ONNX file and its metadata. The checked bytes are those that run; no other file is read.

    Raises: UserError for a missing file, a symbolic link, a file that hf-cifar export did not write, and
    weights in other files, which could be any file of the user's.
    """
    path = Path(name).expanduser()
    if path.is_symlink():
        raise UserError(f"{name} is a symbolic link; pass the file itself, {path.resolve()}")
    if not path.is_file():
        raise UserError(f"no file {name}; pass the --output of hf-cifar export")
    onnx = require("onnx", extra="deploy")
    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own
        raise UserError(
            f"{name} is not an ONNX file ({one_line(error, 200)}); export the run again"
        ) from None
    for tensor in _messages(model, onnx.TensorProto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            places = [each.value for each in tensor.external_data if each.key == "location"]
            raise UserError(
                f"{name} has weights in another file, {listed(places, 1) or 'without a name'}, which is not "
                "read; export the run again, as one file"
            )
    saved = {each.key: each.value for each in model.metadata_props}.get(METADATA)
    if saved is None:
        raise UserError(
            f"{name} has no labels and preprocessing in its metadata; pass a file that hf-cifar export wrote"
        )
    return content, json.loads(saved)


def _messages(message: Any, kind: type) -> Iterator[Any]:
    """Yield all messages of a type inside a protobuf message, at any depth."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for each in [value] if hasattr(value, "ListFields") else value:
            if isinstance(each, kind):
                yield each
            yield from _messages(each, kind)
