"""Other people's tools, with a method of this package in them."""
