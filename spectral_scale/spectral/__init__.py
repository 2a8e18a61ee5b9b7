"""The bank of triplets, the schedule of swaps, and the boundary protocol that joins them."""
