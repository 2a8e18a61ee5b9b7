"""One torch-free specification for each training method."""
