"""Training of the second embedded model, from nothing, on the pictures of ``crop.embedded.scenes``."""
