"""Entries of the tiny families, by how their images become tokens: `squares`, `grids`, `tiles`."""
