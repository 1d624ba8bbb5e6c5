"""`accelerate launch scripts/evaluate_run.py [flags]`: the same as `hf-cifar evaluate [flags]`.

Not named evaluate.py: a script's folder comes first on the path, so it would hide the library of that name.
"""

import sys

from hf_cifar.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
