"""Which pixels support a class: attribution maps, their sanity checks, and pictures of them."""
