"""Metrics: pure functions of the answers to a task's probes that return one float.

A positional parameter is named after the probe that it reads; a function of any one probe calls it `answers`, and the
YAML states the probe (`answers: forget`). Keyword-only parameters are constants that the YAML states. `retrained` holds
the retrained model's answers by probe. The decorator `Scale` declares direction, range and unit. A nan among the
answers gives nan: no example is left out. ValueError for a probe without examples or without a field that is read.
"""
