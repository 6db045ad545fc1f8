"""Training of the second embedded model, from nothing, on the pictures of ``bench.training.model2.pages``."""
