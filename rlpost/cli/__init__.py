"""The command line: one file a command. Each parses its words, calls one function, and prints what it returns."""
