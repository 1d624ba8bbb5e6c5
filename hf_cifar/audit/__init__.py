"""Audits of data: duplicate images, test images in train, image properties."""
