"""A study's folder: atomic files, locks, records of trials."""
