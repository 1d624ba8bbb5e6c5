"""`accelerate launch scripts/evaluate.py [flags]`: the same as `hf-cifar evaluate [flags]`."""

import sys

from hf_cifar.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
