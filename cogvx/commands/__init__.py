"""One module a word of the command line; heavy imports stand inside the functions, so that `--help` is quick."""
