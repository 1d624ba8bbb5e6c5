"""Multiple runs: a recipe with different seeds, and the reproduction of a run."""
