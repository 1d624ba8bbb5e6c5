"""What is wrong with a data set and a recipe, before training."""
