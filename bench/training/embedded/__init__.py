"""Training of the embedded model, from nothing, on the pictures of ``crop.embedded.scenes``."""
