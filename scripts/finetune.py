"""`accelerate launch scripts/finetune.py [flags]`: the same as `hf-cifar finetune [flags]`."""

import sys

from hf_cifar.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
