"""`python -m hf_cifar COMMAND`: the same as `hf-cifar COMMAND`, for launchers that start a module."""

from hf_cifar.cli import run

if __name__ == "__main__":
    run()
