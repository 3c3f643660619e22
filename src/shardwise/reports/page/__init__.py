"""The report: one self-contained HTML page, rendered from a plain document."""
