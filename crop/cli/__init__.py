"""The command line: ``crop ask``, ``crop demo``, ``crop info``."""
