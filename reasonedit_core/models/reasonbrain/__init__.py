"""ReasonBrain (arXiv 2507.01908), one module of the paper per file; written from the paper, no published weights fit it.

frce.py eqs. 1 and 2 (visual.py, textual.py), assembler.py eq. 3, qformer.py V̂, cme.py the enhancer, losses.py eqs. A1 and A2.
"""
