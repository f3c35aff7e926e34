"""Runs as a page: one HTML file that needs nothing from elsewhere and shows one run or several."""
