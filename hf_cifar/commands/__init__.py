"""The subcommands of hf-cifar, one file each. Their functions import torch when they need it."""
