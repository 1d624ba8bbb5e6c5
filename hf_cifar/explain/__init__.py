"""Which pixels speak for a class: attribution maps, their sanity checks, and pictures of them."""
