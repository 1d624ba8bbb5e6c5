"""The subcommands of hf-cifar, a file each. What needs torch is imported inside their functions."""
