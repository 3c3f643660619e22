"""Views of results: text only, no arithmetic."""
