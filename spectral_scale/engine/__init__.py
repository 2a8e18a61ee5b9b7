"""The run: built in one visible order, then looped. Nobody else composes the parts."""
