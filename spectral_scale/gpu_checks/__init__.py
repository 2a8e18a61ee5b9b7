"""Checks that need a GPU: the list, the checks themselves, and what runs them one by one."""
