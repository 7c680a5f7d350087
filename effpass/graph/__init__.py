"""Working on graphs: clean, verify, lower, print; and where a node came from."""
