"""One toy for each row of "where to add what": `toys.py` holds what is added, `checks.py` uses it."""
