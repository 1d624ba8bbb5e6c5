"""What may be wrong with data: the same picture twice, test images in train, properties of images."""
