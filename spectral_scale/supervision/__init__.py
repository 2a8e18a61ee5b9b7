"""Watches over a run: signals, consensus of the ranks, health, heartbeats, exit status."""
