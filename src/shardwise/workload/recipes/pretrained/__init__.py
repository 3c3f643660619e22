"""A Hugging Face folder: its architecture, its weights, its tokenizer and the task that its architecture names."""
