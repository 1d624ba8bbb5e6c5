"""hf_cifar.preprocessor: an image has the same pixels and the same top-1, however the model runs."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from pictures import ORIENTATION, encode, png16, tiff
from PIL import Image

from hf_cifar import PredictConfig, build_model, load_classifier, predict_files
from hf_cifar.config.data import ValueRange
from hf_cifar.config.deployment import ExportConfig
from hf_cifar.config.model import ModelConfig
from hf_cifar.deploy.export import export_run
from hf_cifar.deploy.graph import PixelGraph
from hf_cifar.errors import UserError
from hf_cifar.preprocessor import Preprocessor

GENERATOR = np.random.default_rng(0)
SIZE = 32


def noise(*shape, kind=np.uint8):
    """Random blocks, so that an average of many pixels differs between images."""
    small = GENERATOR.integers(0, np.iinfo(kind).max, (3, 3, *shape[2:]))
    rows, columns = (np.arange(side) * 3 // side for side in shape[:2])
    return small[rows][:, columns].astype(kind)


def files():
    """The bytes of an image file by its kind."""
    rgb = Image.fromarray(noise(40, 60, 3))
    clear = rgb.convert("P")
    clear.info["transparency"] = 3
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    frames = [Image.fromarray(noise(30, 30, 3)) for _ in range(3)]
    return {
        "rgb": encode(rgb),
        "grey": encode(Image.fromarray(noise(33, 48))),
        "one bit": encode(Image.fromarray(noise(50, 50)).convert("1")),
        "palette": encode(Image.fromarray(noise(20, 70, 3)).convert("P")),
        "clear palette": encode(clear),
        "rgba": encode(Image.fromarray(noise(45, 31, 4), "RGBA")),
        "grey with alpha": encode(Image.fromarray(noise(45, 31, 2), "LA")),
        "cmyk jpeg": encode(Image.fromarray(noise(40, 40, 4), "CMYK"), "JPEG"),
        "jpeg": encode(Image.fromarray(noise(64, 48, 3)), "JPEG"),
        "turned jpeg": encode(Image.fromarray(noise(64, 48, 3)), "JPEG", exif=turned),
        "16-bit png": png16(noise(36, 36, 3, kind=np.uint16)),
        "16-bit tiff": tiff(noise(36, 50, 1, kind=np.uint16)),
        "float tiff": encode(Image.fromarray(noise(36, 36).astype(np.float32) / 255), "TIFF"),
        "tiff": encode(Image.fromarray(noise(52, 40, 3)), "TIFF"),
        "webp": encode(Image.fromarray(noise(41, 43, 3)), "WEBP", lossless=True),
        "animation": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bmp": encode(Image.fromarray(noise(SIZE, SIZE, 3)), "BMP"),
        "one pixel": encode(Image.fromarray(noise(1, 1, 3))),
        "tall": encode(Image.fromarray(noise(900, 4, 3))),
        "wide": encode(Image.fromarray(noise(5, 700, 3))),
        "large": encode(Image.fromarray(noise(1200, 1000, 3))),
    }


FILES = files()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, its two exports, and the images."""
    folder = tmp_path_factory.mktemp("contract")
    torch.manual_seed(0)
    options = ModelConfig(model_name_or_path="scratch/test_resnet", image_size=SIZE)
    model, processor = build_model(options, {i: f"class {i}" for i in range(5)})
    with torch.no_grad():  # an untrained network prefers one class: remove that, and scale the rest
        logits = model.eval()(pixel_values=Preprocessor.of(model, processor)(list(FILES.values())))
        head = model.timm_model.fc
        head.bias.sub_(logits.logits.mean(dim=0))
        head.weight.mul_(30)
        head.bias.mul_(30)
    model.save_pretrained(folder / "run")
    processor.save_pretrained(folder / "run")
    for name, inside in (("float", False), ("uint8", True)):
        output = str(folder / f"{name}.onnx")
        export_run(
            folder / "run",
            ExportConfig(output=output, with_preprocessing=inside, parity_images=0),
        )
    for kind, content in FILES.items():
        (folder / kind).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def classifier(folder):
    return load_classifier(str(folder / "run"))


@pytest.fixture(scope="module")
def pixel_graph(classifier, folder):
    """The preprocessing alone as an ONNX graph."""
    preprocessor = Preprocessor.of(*classifier)
    sizes = {i: torch.export.Dim(name) for i, name in enumerate(("batch", "height", "width"))}
    example = torch.zeros(2, 40, 50, 3, dtype=torch.uint8)
    graph = PixelGraph(preprocessor.preprocessing).eval()
    program = torch.onnx.export(
        graph, (example,), dynamic_shapes=(sizes,), dynamo=True,
        input_names=["images"], verbose=False,
    )  # fmt: skip
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString())


@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_the_same_bit_for_bit(kind, folder, classifier, pixel_graph):
    preprocessor = Preprocessor.of(*classifier)
    pixels = preprocessor.pixels([folder / kind])
    assert pixels.shape == (1, 3, SIZE, SIZE)
    decoded = preprocessor.decode(FILES[kind])
    (inside,) = pixel_graph.run(None, {"images": decoded[None]})
    np.testing.assert_array_equal(inside, pixels.numpy())
    # The saved image processor, as `pipeline` uses it, for the decoded image.
    theirs = classifier.image_processor(Image.fromarray(decoded), return_tensors="pt")
    ours = preprocessor([decoded])
    torch.testing.assert_close(theirs["pixel_values"], ours, rtol=0, atol=1e-6)
    exported = Preprocessor.of(*load_classifier(str(folder / "float.onnx")))
    assert torch.equal(exported([folder / kind]), ours)


def test_top_1_is_the_same_however_the_model_runs(folder, classifier):
    model, preprocessor = classifier.model, Preprocessor.of(*classifier)
    paths = [folder / kind for kind in FILES]
    with torch.inference_mode():
        logits = model(pixel_values=preprocessor(paths)).logits
    expected = [model.config.id2label[i] for i in logits.argmax(dim=1).tolist()]
    assert len(set(expected)) > 2
    for name in ("run", "float.onnx"):
        config = PredictConfig(model_name_or_path=str(folder / name), use_cpu=True)
        records = list(predict_files(config, [str(path) for path in paths]))
        assert [record["label"] for record in records] == expected
    session = onnxruntime.InferenceSession(folder / "uint8.onnx")
    notes = json.loads(session.get_modelmeta().custom_metadata_map["hf_cifar"])
    inside = [
        session.run(None, {"images": preprocessor.decode(path)[None]})[0][0] for path in paths
    ]
    assert [notes["labels"][row.argmax()] for row in inside] == expected
    assert np.abs(np.stack(inside) - logits.numpy()).max() < 1e-4 * logits.abs().max()


def test_arrays_tensors_and_pictures_have_the_pixels_of_their_files(classifier):
    preprocessor = Preprocessor.of(*classifier)
    array = noise(40, 60, 3)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    same = [array, tensor, array / 255, Image.fromarray(array), encode(Image.fromarray(array))]
    pixels = preprocessor.pixels(same)
    assert all(torch.equal(each, pixels[0]) for each in pixels)
    deep = noise(40, 60, kind=np.uint16)
    pixels = preprocessor.pixels([deep, tiff(deep[..., None])])
    assert torch.equal(pixels[0], pixels[1])


def test_the_contract_is_saved_as_json(classifier):
    preprocessing = Preprocessor.of(*classifier).preprocessing
    preprocessor = Preprocessor(preprocessing, ValueRange(10, 4000), 10_000)
    saved = json.loads(json.dumps(preprocessor.to_dict()))
    assert Preprocessor.from_dict(saved) == preprocessor
    deep = np.full((8, 8), 4000, np.uint16)
    assert (preprocessor.decode(deep) == 255).all()
    with pytest.raises(UserError, match="exceed the limit of 10,000"):
        preprocessor.decode(encode(Image.fromarray(noise(101, 100, 3))))
