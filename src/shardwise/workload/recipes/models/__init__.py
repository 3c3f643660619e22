"""The recipes' models: ordinary PyTorch, nothing in it knows how it will be split."""
