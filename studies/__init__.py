"""Studies as data: rows of flags times seeds, planned, run and continued."""
