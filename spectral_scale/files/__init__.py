"""What file systems and files that users hand over can and cannot do. Knows errors only."""
