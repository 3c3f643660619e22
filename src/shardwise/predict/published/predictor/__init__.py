"""Training of transformers predicted from sizes alone: no model is built, no program is run."""
