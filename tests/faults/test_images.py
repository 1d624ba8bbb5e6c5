"""Every kind of image file, and decompression bombs."""

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pictures import ORIENTATION, UPRIGHT, encode, grey_rgb, over_white
from PIL import Image
from transformers import AutoImageProcessor

from hf_cifar.cli import main
from hf_cifar.config.data import DataConfig
from hf_cifar.data.images import decode_image
from hf_cifar.data.split import prepare_split
from hf_cifar.data.splits import load_splits
from hf_cifar.data.store import build_store
from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing

SIDE = 32
FLAGS = ["--use_cpu", "--dataloader_num_workers", "0"]


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setenv("HF_CIFAR_CACHE", str(tmp_path / "pixels"))


@pytest.fixture(scope="module")
def vit(save_vit):
    """A ViT of one layer whose input is 32 x 32 px, not resized."""
    return save_vit(
        SIDE, patch_size=8, hidden_size=16, num_hidden_layers=1, intermediate_size=32, num_labels=2
    )


def finetune(data, output_dir, model, *flags):
    return main(
        [
            "finetune", "--dataset_name", str(data), "--output_dir", str(output_dir),
            "--model_name_or_path", str(model), "--num_train_epochs", "1", "--precision", "fp32",
            "--memory_format", "contiguous", "--disable_tqdm", "true", *FLAGS, *flags,
        ]
    )  # fmt: skip


# --- 16: the same pixels everywhere


def variants():
    """Return name, file and expected pixels [32, 32, 3] 0..255 of each kind of image."""
    generator = np.random.default_rng(0)

    def noise(*channels):
        return generator.integers(0, 256, (SIDE, SIDE, *channels), dtype=np.uint8)

    grey, alpha, rgb = noise(), noise(), noise(3)
    yield "L.png", encode(Image.fromarray(grey)), grey_rgb(grey)
    light = noise()
    pair = Image.merge("LA", (Image.fromarray(light), Image.fromarray(alpha)))
    yield "LA.png", encode(pair), over_white(grey_rgb(light), alpha)
    palette = Image.fromarray(noise(3)).quantize(64)
    yield "P.png", encode(palette), np.asarray(palette.convert("RGB"))
    yield "RGBA.png", encode(Image.fromarray(np.dstack((rgb, alpha)))), over_white(rgb, alpha)
    ink = np.dstack((noise(3), np.zeros((SIDE, SIDE), np.uint8)))
    yield "CMYK.tiff", encode(Image.fromarray(ink, "CMYK"), "TIFF"), 255 - ink[..., :3]
    deep = generator.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    yield "I16.png", encode(Image.fromarray(deep)), grey_rgb((deep / 257).round())
    bits = noise() > 127
    yield "1.png", encode(Image.fromarray(bits)), grey_rgb(bits * 255)
    for orientation, upright in UPRIGHT.items():
        stored, exif = noise(3), Image.Exif()
        exif[ORIENTATION] = orientation
        yield f"EXIF{orientation}.png", encode(Image.fromarray(stored), exif=exif), upright(stored)
    film = [Image.fromarray(noise(3)).quantize(64) for _ in range(2)]
    gif = encode(film[0], "GIF", save_all=True, append_images=film[1:], duration=50)
    yield "film.gif", gif, np.asarray(film[0].convert("RGB"))
    film = [Image.fromarray(noise(3)) for _ in range(4)]
    webp = encode(
        film[0], "WEBP", save_all=True, append_images=film[1:2], duration=50, lossless=True
    )
    yield "film.webp", webp, np.asarray(film[0])
    apng = encode(film[2], "PNG", save_all=True, append_images=film[3:], duration=50)
    yield "film.png", apng, np.asarray(film[2])


class Seen:
    """Records the pixels passed to the first convolution, as 0..255, in training and in evaluation."""

    def __init__(self):
        self.images = {True: [], False: []}

    def __call__(self, module, inputs):
        if isinstance(module, torch.nn.Conv2d):
            pixels = (inputs[0].detach() * 0.5 + 0.5) * 255
            if (pixels - pixels.round()).abs().max() > 1e-2:
                return  # not an image: the model is first run on zeros
            pixels = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            self.images[module.training] += list(pixels)

    def __enter__(self):
        self.hook = torch.nn.modules.module.register_module_forward_pre_hook(self)
        return self

    def __exit__(self, *_):
        self.hook.remove()


def test_the_same_pixels_everywhere(tmp_path, vit, capsys, record_result):
    kinds, files = list(variants()), []
    for split in ("train", "validation", "test"):
        for number, (name, content, _) in enumerate(kinds):
            path = tmp_path / "data" / split / ("one", "two")[number % 2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            files += [path] if split == "test" else []
    ways = {}
    for store in ("resident", "streamed"):
        with Seen() as seen:
            flags = ("--pixel_store", store, "--flip", "0", "--crop_padding", "0")
            assert finetune(tmp_path / "data", tmp_path / store, vit, *flags) == 0
        ways[f"training, {store}"] = seen.images[True]
        ways[f"validation, {store}"] = seen.images[False]
        with Seen() as seen:
            argv = ["evaluate", "--model_name_or_path", str(tmp_path / store), "--split", "test"]
            assert main([*argv, *FLAGS]) == 0
        ways[f"evaluation, {store}"] = seen.images[False]
    with Seen() as seen:
        argv = ["predict", "--model_name_or_path", str(tmp_path / "resident"), "--use_cpu"]
        assert main([*argv, *map(str, files)]) == 0
    capsys.readouterr()
    predicted = seen.images[False]
    ways = {way: {image.tobytes() for image in images} for way, images in ways.items()}
    assert {way: len(images) for way, images in ways.items()} == dict.fromkeys(ways, len(kinds))
    preprocessing = Preprocessing.from_image_processor(AutoImageProcessor.from_pretrained(vit))
    train = load_splits(DataConfig(dataset_name=str(tmp_path / "data"))).train
    store = build_store(prepare_split(train, preprocessing, augmented=True, kind="streamed"))
    names = [Path(row["path"]).name for row in train.rows["image"]]
    same = sum(
        bool(np.abs(image - expected).max() <= 1)  # where transparency is blended, otherwise equal
        and all(image.tobytes() in images for images in ways.values())
        and np.array_equal(store[names.index(name)]["pixel_values"][0].permute(1, 2, 0), image)
        for image, (name, _, expected) in zip(predicted, kinds, strict=True)
    )
    requirement = "training (both stores), evaluation and predict see the same, correct pixels"
    record_result(16, f"{len(kinds)} kinds of image", requirement, same, 18)


# --- decompression bombs: small files of huge images


def png_of(side, bits, colour_type):
    """A real PNG of zeros, side x side pixels of `bits` bits."""
    raw = zlib.compressobj(9)
    row = bytes(1 + (side * bits + 7) // 8)
    packed = b"".join(raw.compress(row) for _ in range(side)) + raw.flush()

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    depth = 1 if bits == 1 else 8
    header = struct.pack(">IIBBBBB", side, side, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    )


def patched(content, at, value):
    return content[:at] + value + content[at + len(value) :]


def bombs():
    """Return name and bytes of files that declare, or contain, far more pixels than bytes."""
    small = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    film = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), "red")], "duration": 50}
    yield "one_bit.png", png_of(13_000, 1, 0)  # 844 MB once it is RGB
    yield "rgb.png", png_of(12_000, 24, 2)
    gif = encode(small, "GIF", **film)
    yield "screen.gif", patched(gif, 6, struct.pack("<HH", 60_000, 60_000))
    frame = gif.index(b"\x2c\0\0\0\0")  # the first frame's place and size
    yield "frame.gif", patched(gif, frame + 5, struct.pack("<HH", 60_000, 60_000))
    webp = encode(small, "WEBP", lossless=True)
    bits = struct.unpack_from("<I", webp, 21)[0]
    size = struct.pack("<I", bits | 0x0FFFFFFF)  # twice 14 bits
    yield "whole.webp", patched(webp, 21, size)
    webp = encode(small, "WEBP", lossless=True, **film)
    yield "film.webp", patched(webp, 24, b"\xff\x3f\x00\xff\x3f\x00")
    jpeg = encode(small, "JPEG")
    yield (
        "giant.jpg",
        patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", 65_500, 65_500)),
    )
    yield "giant.bmp", patched(encode(small, "BMP"), 18, struct.pack("<ii", 40_000, 40_000))
    yield "giant.ppm", b"P6 40000 40000 255\n" + bytes(100)
    icon = png_of(13_000, 1, 0)
    yield "icon.ico", struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(icon), 22) + icon


def memory(name):
    """Return the current (VmRSS) or peak (VmHWM) memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def in_child(work):
    """Return the result of `work` in a child process, and the peak growth of its memory in MB."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
            before = memory("VmRSS")
            content = json.dumps([work(), memory("VmHWM") - before])
            os.write(writing, content.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def refusal(content):
    try:
        decode_image(content)
    except UserError as error:
        return str(error)
    return "decoded"


@pytest.mark.filterwarnings("ignore:Image size")
def test_bombs(tmp_path, vit, capfd, record_result):
    data, run = tmp_path / "data", tmp_path / "run"
    for split in ("train", "validation", "test"):
        for number in range(8):
            folder = data / split / ("one", "two")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    assert finetune(data, run, vit) == 0
    data = shutil.copytree(data, tmp_path / "with_bombs")
    files, refused, most = list(bombs()), 0, 0.0
    for name, content in files:
        message, megabytes = in_child(lambda content=content: refusal(content))
        most = max(most, megabytes)
        wanted = (
            "exceed the limit of 67,108,864|exceeds limit|is an icon" if "ico" in name else "exceed"
        )
        refused += any(word in message for word in wanted.split("|")) and megabytes < 50
    kinds = "PNG of 20 KB, GIF, WebP, JPEG, BMP, ICO"
    fault = f"decoding {len(files)} decompression bombs and huge images ({kinds})"
    record_result(
        "-",
        fault,
        f"refused before decoding; at most 50 MB of extra memory (measured: {most:.0f})",
        refused,
        len(files),
    )

    kept, most = 0, 0.0
    for name, content in files[:6]:
        (data / "test" / "one" / name).write_bytes(content)
    bomb = str(data / "test" / "one" / "one_bit.png")
    model = ["--model_name_or_path", str(run)]
    test = ["evaluate", *model, "--split", "test", "--dataset_name", str(data), *FLAGS]
    test += ["--output_dir", str(tmp_path / "other")]
    commands = {
        "training": lambda: finetune(data, tmp_path / "never", vit, "--do_predict"),
        "evaluation": lambda: main(test),
        "evaluation, streamed": lambda: main([*test, "--pixel_store", "streamed"]),
        "predict": lambda: main(["predict", *model, "--use_cpu", bomb]),
    }
    for name, command in commands.items():
        status, megabytes = in_child(command)
        captured = capfd.readouterr()
        wanted = (
            "13000 x 13000 pixels" if name == "predict" else "6 images cannot be read, test rows"
        )
        assert wanted in captured.out + captured.err
        most = max(most, megabytes)
        kept += status == (1 if name == "predict" else 2) and megabytes < 50
    assert not (tmp_path / "never").exists()
    requirement = f"named in the error; at most 50 MB of extra memory (measured: {most:.0f})"
    record_result(
        "-",
        "decompression bombs in the data of training, evaluation and predict",
        requirement,
        kept,
        len(commands),
    )
