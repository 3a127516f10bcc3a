import os

# Matplotlib must not look for a display.
os.environ.setdefault("MPLBACKEND", "Agg")
