"""What tasks other than language modelling need around a model: readers of data, and scores."""
