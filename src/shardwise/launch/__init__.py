"""Starting, joining, watching and ending of worker processes."""
