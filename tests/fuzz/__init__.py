"""Arbitrary input for everything that reads what others wrote: `targets` has one function for each entry."""
