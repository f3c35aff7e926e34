"""Files, Hub datasets and rows in memory -> raw rows."""
