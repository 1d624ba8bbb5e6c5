"""Write one of scikit-learn's digits as a PNG: `quickstart_image.py FILE.png [ROW]`."""

import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

if __name__ == "__main__":
    row = int(sys.argv[2]) if len(sys.argv) > 2 else 42
    pixels = (load_digits().images[row] * (255 / 16)).round().astype(np.uint8)
    Image.fromarray(pixels).save(sys.argv[1])
