"""Graph of one training step of a plain module, with each module that cannot be traced as one call in it."""
