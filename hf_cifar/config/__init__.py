"""What can be asked: options by room, and the command line and YAML files that give them."""
