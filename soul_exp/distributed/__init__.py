"""Processes: started or joined, interrupted, and what their ranks do together."""
