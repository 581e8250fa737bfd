"""The command line: one verb is one file that parses, calls and prints."""
