"""Choosing: which strategies there are (`space`), what each costs at least (`bounds`), which is best (`search`), why."""
