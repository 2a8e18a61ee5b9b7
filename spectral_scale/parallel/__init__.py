"""Who we are among the processes, and what every process must agree on."""
