"""Pure rules of how work is split: the program runs them and the prediction reads them. No torch."""
