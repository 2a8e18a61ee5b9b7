"""The console command: one thin file a sub-command. The only place that prints."""
