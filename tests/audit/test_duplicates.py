from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from hf_cifar.audit.duplicates import find_duplicates, perceptual_hashes, thumbnail_of


@pytest.fixture(scope="module")
def patches():
    """Real images, uint8 [N, 32, 32, 3]: patches of two photographs, without sky and shadow."""
    photographs = load_sample_images().images
    cut = [
        image[y : y + 32, x : x + 32]
        for image in photographs
        for y in range(0, image.shape[0] - 32, 36)
        for x in range(0, image.shape[1] - 32, 36)
    ]
    return np.stack([patch for patch in cut if patch.mean(axis=2).std() > 25])


def encoded(image, side=None, **options):
    """Save and reload a picture, resized to `side` in between if given."""
    picture = Image.fromarray(image)
    if side:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return np.asarray(Image.open(file).convert("RGB"))


def test_exactly_the_duplicates_are_found(patches):
    generator = np.random.default_rng(0)
    order = generator.permutation(len(patches))
    train, test, planted = patches[order[:90]], patches[order[90:]], generator.permutation(90)[:50]
    pairs = find_duplicates(np.concatenate([test, train[planted]]), train)
    assert {(p.first - len(test), p.second) for p in pairs if p.exact} == set(
        enumerate(planted.tolist())
    )
    assert not [pair for pair in pairs if pair.first < len(test)]


@pytest.mark.parametrize("how", [{"quality": 75}, {"side": 48, "quality": 85}])
def test_re_encoded_and_resized_copies_are_found(patches, how):
    train = list(patches)
    copies = [encoded(image, **how) for image in train[:50]]
    pairs = find_duplicates(copies, train)
    assert not any(pair.exact for pair in pairs)
    assert len({p.first for p in pairs if p.first == p.second}) >= 45
    assert not [pair for pair in pairs if pair.first != pair.second]
    assert [pair.difference for pair in pairs] == sorted(pair.difference for pair in pairs)


def test_pairs_within_one_set_are_listed_once(patches):
    images = np.concatenate([patches[:20], patches[3:5]])
    assert [pair[:3] for pair in find_duplicates(images)] == [(3, 20, True), (4, 21, True)]


def test_uniform_images_match_only_if_equal():
    white, grey = np.full((32, 32, 3), 255, np.uint8), np.full((32, 32, 3), 128, np.uint8)
    assert find_duplicates(np.stack([white, grey]), np.stack([white, grey + 1])) == [
        (0, 0, True, 0.0)
    ]


def test_hash_is_invariant_to_size_and_brightness(patches):
    picture = Image.fromarray(patches[5])
    larger = np.asarray(picture.resize((96, 96), Image.Resampling.BICUBIC))
    darker = (patches[5] * 0.7).astype(np.uint8)
    hashes = perceptual_hashes(
        np.stack([thumbnail_of(each) for each in (patches[5], larger, darker)])
    )
    assert hashes.shape == (3,) and hashes.dtype == np.uint64
    assert all(
        25 <= bits <= 38 for bits in np.bitwise_count(hashes)
    )  # half of 63 are above the median
    assert np.bitwise_count(hashes[0] ^ hashes[1]) <= 4
    assert np.bitwise_count(hashes[0] ^ hashes[2]) <= 4


def test_small_images_match_only_if_equal(patches):
    small = patches[:10, 12:20, 12:20]
    brighter = np.clip(small.astype(int) + 3, 0, 255).astype(np.uint8)
    assert [pair[:3] for pair in find_duplicates(small, np.concatenate([brighter, small]))] == [
        (number, 10 + number, True) for number in range(10)
    ]
