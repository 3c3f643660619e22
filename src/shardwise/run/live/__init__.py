"""State of a run, read from the files in its folder while it goes on or after it ended."""
