"""The command line, one file per command: thin shells over functions of the library."""
