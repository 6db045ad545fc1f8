"""The command line: ``crop ask``, ``crop demo``, ``crop app``, ``crop info``."""
