"""Every option, and the command line and YAML files that set them."""
