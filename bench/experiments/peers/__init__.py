"""Optimizers of the same kind as those of this package, written from their papers to be read.

They are meant for comparing losses over steps.  Their own implementations are faster.
"""

from .dense import Dense
from .muon import Muon
from .psgd import PSGDKron
from .shampoo import Shampoo
from .soap import SOAP

__all__ = ["SOAP", "Dense", "Muon", "PSGDKron", "Shampoo"]
