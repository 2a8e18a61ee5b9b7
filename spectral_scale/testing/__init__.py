"""Helpers of the test-suite that users may borrow. Nothing in the product imports this."""
