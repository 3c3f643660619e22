"""Choosing: which strategies there are (`space`), what each costs at least (`bounds`), the best (`search`), and why."""
