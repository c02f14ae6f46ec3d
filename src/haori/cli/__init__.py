"""The command line. Every heavy import sits inside a command, so that `--help` stays quick."""
