"""What a run leaves: reading run folders, tables, plots."""
