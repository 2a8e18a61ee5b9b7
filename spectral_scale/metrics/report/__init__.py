"""report.html: one page about one run, or several compared."""
