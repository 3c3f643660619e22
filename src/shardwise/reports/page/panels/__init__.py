"""The panels of the report; each module makes one kind of panel from the document of a report."""
