"""How worker processes come to life."""
