"""What a run needs and costs, computed before it starts. Nothing here is measured."""
