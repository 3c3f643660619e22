"""Models of the recipes: ordinary PyTorch, written without regard to how they are split."""
