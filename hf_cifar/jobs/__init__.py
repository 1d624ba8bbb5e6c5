"""Run a command on another machine: what is sent there, and how it is submitted."""
