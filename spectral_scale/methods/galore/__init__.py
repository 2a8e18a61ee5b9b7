"""GaLore."""
