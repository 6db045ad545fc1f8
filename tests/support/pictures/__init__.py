"""Pictures whose pixels encode their coordinates, through every family's own processor and packing.

In each file ``CASES``: picture size -> (config, processor, its output, colours in the order of the image tokens, row breaks).
"""
