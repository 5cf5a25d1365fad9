"""Lists of pinned wheels, one for each Python and CUDA that a box has."""
